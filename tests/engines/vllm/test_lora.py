"""LoRA adapters: what is refused without an engine, and what they say with one."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from models import lora as maker
from preload.errors import WeightsError
from tests.engines.vllm import merged
from tests.preload.hub import Hub, Running
from tests.support import MODEL, ROOT, START, WORKER, eventually, start, stop, worker_environment
from worker import configuration
from worker.engines.servers.process import free_port
from worker.engines.vllm import config, lora
from worker.errors import SettingsError
from worker.settings import Settings

BASE = Path(MODEL)
BODY = {"prompt": merged.PROMPT, "max_tokens": merged.TOKENS, "temperature": 0}


def settings(*paths: Path, **args: Any) -> Settings:
    modules = [{"name": path.name, "path": str(path)} for path in paths]
    given = {"enable_lora": True, "lora_modules": modules, **args}
    return Settings(mode_to_run="api", model=MODEL, engine_args=given)


def changed(folder: Path, **values: Any) -> Path:
    """The adapter with other values in its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"lora_modules": ["a=org/a"]}, 'lora_modules needs "enable_lora": true beside it'),
        (
            {"lora_modules": ["a=org/a"], "enable-lora": False},
            'lora_modules needs "enable_lora": true beside it',
        ),
        (
            {"enable_lora": True, "lora_modules": [{"name": "a"}]},
            'lora_modules: {"name": "a"} must be an object such as {"name": "a", "path": "org/a"}',
        ),
        (
            {"enable_lora": True, "lora_modules": ["a=no adapter"]},
            "lora_modules: path=no adapter must be a hub id (org/name or org/name@revision) or a "
            "local folder (/path or ./path)",
        ),
        (
            {"enable_lora": True, "lora_modules": ["a=org/a", "a=org/b"]},
            "lora_modules: two adapters have the name a; each needs its own",
        ),
    ],
)
def test_what_settings_refuse(
    monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], sentence: str
) -> None:
    given = json.dumps(args)
    for name, value in {"MODE_TO_RUN": "api", "MODEL": MODEL, "ENGINE_ARGS": given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        configuration.load(os.environ)
    assert error.value.problems == [f"ENGINE_ARGS={given}: {sentence}"]


@pytest.mark.parametrize(
    ("rank", "given", "found"),
    [(8, {}, None), (16, {}, None), (17, {}, 32), (300, {}, 320), (8, {"max_lora_rank": 64}, 64)],
)
def test_the_rank_that_adapters_need(
    tmp_path: Path, rank: int, given: dict[str, int], found: int | None
) -> None:
    small = maker.make(tmp_path / "small", rank=1)
    large = changed(maker.make(tmp_path / "large", rank=4), rank_pattern={"q_proj": rank})
    applied = lora.applied(settings(small, large, **given), BASE)
    assert applied.engine_args.get("max_lora_rank") == found


def refused(path: Path, **args: Any) -> str:
    with pytest.raises((SettingsError, WeightsError)) as error:
        lora.applied(settings(path, **args), BASE)
    said = str(error.value)
    assert "\n" not in said
    return said.removeprefix(f"ENGINE_ARGS lora_modules path={path}: ")


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    ranked = maker.make(tmp_path / "ranked", rank=20)
    assert refused(ranked, max_lora_rank=16) == (
        "its rank is 20, and max_lora_rank=16 in ENGINE_ARGS; set it to 32, or leave it out"
    )
    huge = changed(ranked, r=1000)
    assert refused(huge) == "its rank is 1000, and vLLM serves 512 at most"
    assert refused(changed(huge, peft_type="IA3")) == (
        "its adapter_config.json says IA3, and vLLM serves LORA alone"
    )
    (huge / "adapter_config.json").write_text("{}")
    assert refused(huge) == "its adapter_config.json can't be read as that of LoRA"
    assert refused(tmp_path / "nowhere") == "there is no such folder"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == (
        "it holds no adapter_config.json, so it is no LoRA adapter"
    )
    broken = maker.make(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert refused(broken).startswith(f"{broken / 'adapter_model.safetensors'} can't be read: ")
    named = Settings(
        mode_to_run="api", model=MODEL, served_model_name="ranked", engine_args={}
    ).model_copy(update={"engine_args": settings(ranked).engine_args})
    with pytest.raises(SettingsError, match="the name ranked is that of the model itself"):
        lora.applied(named, BASE)


def test_an_adapter_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_model = json.loads((BASE / "config.json").read_text())
    for change, sentence in (
        (
            {"hidden_size": 128},
            "model.layers.0.mlp.down_proj is 256 x 704 in the model, and 128 there",
        ),
        ({"num_hidden_layers": 7}, "the model has no model.layers.6.mlp.down_proj"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(of_model | change))
        other = maker.make(tmp_path / "other", base=tmp_path, named="org/other")
        assert refused(other) == (
            f"it is an adapter of org/other and does not fit MODEL={MODEL}: {sentence}"
        )
    caplog.set_level(logging.WARNING)
    namesake = maker.make(tmp_path / "namesake", named="org/other")
    lora.applied(settings(namesake), BASE)
    assert f"was trained on org/other, and MODEL={MODEL}" in caplog.text


def test_ranks_are_vllms() -> None:
    [package] = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr]
    source = (Path(package) / "config" / "lora.py").read_text(encoding="utf-8")
    assert f"MaxLoRARanks = Literal{list(lora.RANKS)}" in source
    assert f"max_lora_rank: MaxLoRARanks = {lora.DEFAULT_RANK}\n" in source
    assert "max_loras: int = Field(default=1, " in source  # docs/how-to/lora.md says so


@pytest.mark.parametrize(
    ("args", "slots", "is_warned"),
    [({}, 3, False), ({"max-loras": 2}, 2, True), ({"max_loras": 3}, 3, False)],
)
def test_on_a_cpu_a_slot_stays_empty(
    caplog: pytest.LogCaptureFixture, args: dict[str, int], slots: int, is_warned: bool
) -> None:
    parsed = SimpleNamespace(enable_lora=True, max_loras=next(iter(args.values()), 1))
    config._keep_a_slot_empty(parsed, 2, args)  # type: ignore[arg-type]
    assert parsed.max_loras == slots
    assert ("requests for the model itself are answered wrongly" in caplog.text) == is_warned


@dataclass
class Served:
    """A worker in api mode with two adapters, `a` in a folder and `b` on a hub."""

    http: httpx.Client
    log: str
    texts: dict[str, str]
    """By the model's name: what transformers says, with the adapter merged into the weights."""

    def says(self, name: str) -> str:
        answer = self.http.post("/v1/completions", json=BODY | {"model": name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        text: str = answer.json()["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("lora")
    a, b = maker.make(home / "a", 1), maker.make(home / "b", 2, rank=32)
    hub = Hub(token="hf_right")
    hub.add("org/b", b, gated=True, tags=("v1",))
    args = {
        "dtype": "float32",
        "kv_cache_memory_bytes": 256 << 20,
        "enable_lora": True,
        "lora_modules": [{"name": "a", "path": str(a)}, {"name": "b", "path": "org/b@v1"}],
    }
    port = free_port()
    with Running(hub) as hub_here, ThreadPoolExecutor() as pool:
        environment = worker_environment(
            MODE_TO_RUN="api",
            HOST="127.0.0.1",
            PORT=str(port),
            ENGINE_ARGS=json.dumps(args),
            HF_ENDPOINT=hub_here.url,
            HF_HOME=str(home / "hf"),
            HF_TOKEN="hf_right",
        )
        process, output = start(WORKER, environment)
        command = [sys.executable, "-m", "tests.engines.vllm.merged", MODEL, str(a), str(b)]
        asked = pool.submit(subprocess.check_output, command, cwd=ROOT, text=True)
        try:
            eventually(
                lambda: output.find("ready after") or process.poll() is not None, START, "a start"
            )
            assert output.find("ready after"), output.text()
            texts = dict(zip((MODEL, "a", "b"), json.loads(asked.result()), strict=True))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                yield Served(http, output.text(), texts)
        finally:
            stop(process)


@pytest.mark.engine
def test_each_says_what_its_merged_weights_say(served: Served) -> None:
    assert len(set(served.texts.values())) == 3
    assert {name: served.says(name) for name in served.texts} == served.texts


@pytest.mark.engine
def test_all_of_them_in_one_batch(served: Served) -> None:
    names = list(served.texts) * 6
    with ThreadPoolExecutor(len(names)) as pool:
        said = list(pool.map(served.says, names))
    assert said == [served.texts[name] for name in names]


@pytest.mark.engine
def test_streams(served: Served) -> None:
    body = BODY | {"model": "a", "stream": True}
    answer = served.http.post("/v1/completions", json=body)
    assert joined(answer.text) == served.texts["a"]
    job = {"openai_route": "/v1/completions", "openai_input": body}
    events = served.http.post("/predict", json=job).json()
    assert joined("".join(events)) == served.texts["a"]


def joined(events: str) -> str:
    *data, done = re.findall(r"^data: (.*)$", events, re.MULTILINE)
    assert done == "[DONE]"
    return "".join(json.loads(one)["choices"][0]["text"] for one in data)


@pytest.mark.engine
def test_by_name_in_a_job(served: Served) -> None:
    def answer(route: str, body: Any = None) -> Any:
        job = {"openai_route": route, "openai_input": body}
        [output] = served.http.post("/predict", json=job).json()
        return output

    for name, text in served.texts.items():
        assert answer("/v1/completions", BODY | {"model": name})["choices"][0]["text"] == text
    chat = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 16}
    said = {
        answer("/v1/chat/completions", chat | {"model": name})["choices"][0]["message"]["content"]
        for name in served.texts
    }
    assert len(said) == 3
    listed = answer("/v1/models")["data"]
    assert [one["id"] for one in listed] == [MODEL, "a", "b"]
    assert [one["parent"] for one in listed] == [None, MODEL, MODEL]
    assert answer("/v1/models/b")["id"] == "b"


@pytest.mark.engine
def test_by_name_beside_a_prompt_or_messages(served: Served) -> None:
    options = {name: BODY[name] for name in ("temperature", "max_tokens")}

    def answer(**asked: Any) -> str:
        [output] = served.http.post("/predict", json=asked | {"options": options}).json()
        return str(output["text"])

    for name, text in served.texts.items():
        assert answer(prompt=BODY["prompt"], model=name) == text
    messages = [{"role": "user", "content": "Hello"}]
    assert len({answer(messages=messages, model=name) for name in served.texts}) == 3


@pytest.mark.engine
def test_models_over_http(served: Served) -> None:
    listed = served.http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == [MODEL, "a", "b"]
    assert served.http.get("/v1/models/a").json()["parent"] == MODEL
    absent = served.http.get("/v1/models/c")
    assert absent.status_code == 404
    assert f"model c is not served; there is {MODEL}, a, b" in absent.text
    assert served.http.post("/v1/completions", json=BODY | {"model": "c"}).status_code == 404


@pytest.mark.engine
def test_the_log_says_where_they_come_from(served: Served) -> None:
    assert re.search(r"adapter a: .*: ENGINE_ARGS names this folder", served.log)
    assert re.search(r"adapter b: .*: org/b@v1 comes from the hub", served.log)
    assert "max_lora_rank=32, for an adapter of rank 32" in served.log
    assert "hf_right" not in served.log
