"""GGUF: the file that `make setup` makes, and what llama.cpp makes of it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models import to_gguf
from preload.model import parse
from preload.weights import find
from tests.support import (
    GGUF,
    ROOT,
    START,
    eventually,
    needs,
    stop,
    worker_environment,
)
from worker.engines.servers.process import free_port
from worker.processes import find_program

pytestmark = pytest.mark.engine

TINY = ROOT / "models" / "tiny"
PROMPTS = [
    "import os\n\ndef ",
    "The list of directories that",
    "def read_json(path):\n    ",
    "class Stack:\n    def __init__(self):\n        ",
    "größer als 漢字 🙂 it's  12345\t\n\n  (x) ->",
    "<|user|>\nWhat can you do?\n<|assistant|>\n",
]
TOKENS = 48


def test_the_bundled_gguf_is_what_the_script_makes_of_the_bundled_model(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    to_gguf.convert(TINY, made)
    assert made.read_bytes() == GGUF.read_bytes()


def test_another_architecture_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"qwen3"'))
    with pytest.raises(to_gguf.NotSupported, match="this qwen3 is no Llama without biases"):
        to_gguf.convert(tmp_path, tmp_path / "x.gguf")


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0", "split"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, httpx.Client]]:
    """llama-server with the model in one type, its cache in float32."""
    model = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    if request.param == "split":
        to_gguf.convert(TINY, model, tensors_a_part=20)
        model = find(parse(str(max(model.parent.glob("*.gguf"))))).gguf
    else:
        to_gguf.convert(TINY, model, to_gguf.Type(request.param))
    port = free_port()
    command = [
        str(find_program("llama-server")),
        "--offline",
        "-m",
        str(model),
        "--port",
        str(port),
    ]
    command += ["-c", "2048", "-np", "1", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    with (model.parent / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=worker_environment(OMP_WAIT_POLICY="passive"), stdout=log, stderr=log
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        try:
            eventually(lambda: healthy(client), START, "llama-server")
            yield request.param, client
        finally:
            stop(process)


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def references() -> list[tuple[str, list[int], list[int]]]:
    """Prompts, their tokens, and the greedy answers of float32 transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = reference.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        found.append((prompt, ids[0].tolist(), answer[0, ids.shape[1] :].tolist()))
    return found


@needs("llama-server")
def test_llama_cpp_reads_and_says_what_transformers_does(
    served: tuple[str, httpx.Client], references: list[tuple[str, list[int], list[int]]]
) -> None:
    """In float32 to the last token; rounded, what the model is sure of."""
    stored, client = served
    same = TOKENS if stored in {"f32", "split"} else 8
    for prompt, ids, expected in references:
        read = client.post("/tokenize", json={"content": prompt, "parse_special": True})
        assert read.json()["tokens"] == ids, prompt
        greedy = {"n_predict": TOKENS, "temperature": 0, "return_tokens": True}
        answer = client.post("/completion", json={"prompt": ids, **greedy})
        assert answer.json()["tokens"][:same] == expected[:same], prompt
