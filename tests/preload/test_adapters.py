"""LoRA adapters that ENGINE_ARGS names: fetched, pinned, baked and found as a model is."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import lora
from preload import weights
from preload.adapters import named
from preload.errors import WeightsError
from preload.model import parse, parse_adapter
from tests.preload.conftest import Preload, make_model
from tests.preload.hub import Running
from tests.preload.test_preload import Refused, paths

FETCHED = {"adapter_config.json", "adapter_model.safetensors", "LICENSE"}
BASE = "meta-llama/Llama-3.1-8B"


def engine_args(*modules: Any) -> str:
    return json.dumps({"enable_lora": True, "lora_modules": list(modules)})


def module(path: str, name: str = "a") -> dict[str, str]:
    return {"name": name, "path": path}


@pytest.fixture
def adapter(served: Running, tmp_path: Path) -> Path:
    """The repository org/adapter, with much that inference does not need."""
    folder = lora.make(tmp_path / "repository", named=BASE)
    make_model(folder, {"LICENSE", "README.md", "optimizer.pt", "tokenizer.json"})
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"older")
    served.hub.add("org/adapter", folder, tags=("v1",))
    return folder


def test_bakes_them_beside_the_model(preload: Preload, served: Running, adapter: Path) -> None:
    given = engine_args(module("org/adapter@v1"), "b=org/adapter", module("/runpod-volume/c", "c"))
    done = preload(ENGINE_ARGS=given)
    assert done.returncode == 0, done.stderr
    pinned = preload.into / "org--adapter@v1--lora"
    assert paths(pinned) == FETCHED | {"manifest.json"}
    assert all((pinned / name).read_bytes() == (adapter / name).read_bytes() for name in FETCHED)
    manifest = json.loads((pinned / "manifest.json").read_text())
    commit = served.hub.repositories["org/adapter"].commit
    assert (manifest["adapter"], manifest["revision"], manifest["commit"]) == (True, "v1", commit)
    assert paths(preload.into / "org--adapter--lora") == FETCHED | {"manifest.json"}
    assert preload.baked.is_dir()
    assert done.stdout.splitlines()[-1] == (
        "ENGINE_ARGS lora_modules path=/runpod-volume/c is a folder: nothing is fetched"
    )

    served.hub.requests.clear()
    again = preload(ENGINE_ARGS=given, HF_ENDPOINT="http://127.0.0.1:9")
    assert "org/adapter@v1 is baked already, at commit" in again.stdout
    assert not served.hub.requests

    places = weights.Places(baked=preload.into, volumes=())
    for text, folder in (("org/adapter@v1", pinned), (f"org/adapter@{commit}", pinned)):
        found = weights.find(parse_adapter(text), places=places)
        assert found.folder in (folder, preload.into / "org--adapter--lora")
        assert "is baked into this image" in found.why


def test_without_a_model_they_are_baked_too(preload: Preload, adapter: Path) -> None:
    assert preload(MODEL="", ENGINE_ARGS=engine_args(module("org/adapter"))).returncode == 0
    assert paths(preload.into / "org--adapter--lora") == FETCHED | {"manifest.json"}


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"MODEL": "org/adapter"},
            f"MODEL=org/adapter: it is a LoRA adapter of {BASE}, and no model; set MODEL={BASE} "
            'and ENGINE_ARGS={"enable_lora": true, "lora_modules": [{"name": "adapter", '
            '"path": "org/adapter"}]}',
        ),
        ({"MODEL": "org/adapter@v1"}, '"path": "org/adapter@v1"}]}'),
        (
            {"MODEL": "", "ENGINE_ARGS": engine_args(module("org/tiny"))},
            "ENGINE_ARGS lora_modules path=org/tiny: it holds no adapter_config.json, so it is no "
            "LoRA adapter",
        ),
        (
            {"MODEL": "", "ENGINE_ARGS": engine_args(module("org/adapter@v9"))},
            "ENGINE_ARGS lora_modules path=org/adapter@v9: the repository has no revision v9; name "
            "a branch, a tag or a commit after the @",
        ),
        (
            {"MODEL": "", "ENGINE_ARGS": engine_args(module("org/absent"))},
            "ENGINE_ARGS lora_modules path=org/absent: the hub knows no such repository",
        ),
        ({"ENGINE_ARGS": "[1]"}, "ENGINE_ARGS: must be a JSON object"),
        ({"ENGINE_ARGS": '{"lora_modules": 1}'}, "ENGINE_ARGS: lora_modules: 1 must be an object"),
    ],
)
def test_refusals(
    refused: Refused, served: Running, variables: dict[str, str], sentence: str
) -> None:
    assert sentence in refused(**variables)
    assert set(served.hub.requests) <= {"adapter_config.json"}


def test_a_gated_one_takes_the_token(preload: Preload, served: Running, adapter: Path) -> None:
    served.hub.add("org/closed-adapter", adapter, gated=True)
    given = {"MODEL": "", "ENGINE_ARGS": engine_args(module("org/closed-adapter"))}
    refused = preload(**given)
    assert "path=org/closed-adapter: this repository is gated; set HF_TOKEN" in refused.stderr
    done = preload(**given, HF_TOKEN="hf_right")
    assert done.returncode == 0
    assert "hf_right" not in done.stdout + done.stderr


def test_from_the_hub_at_run_time(preload: Preload, served: Running, adapter: Path) -> None:
    code = (
        "from preload import model, weights\n"
        "found = weights.find(model.parse_adapter('org/adapter@v1'))\n"
        "print(found.folder, '|', found.why, sep='')"
    )
    first = preload.python(code)
    assert first.returncode == 0, first.stderr
    folder, why = first.stdout.strip().split("|")
    assert paths(Path(folder)) == FETCHED
    assert "comes from the hub" in why
    served.hub.requests.clear()
    assert "as the hub has it now" in preload.python(code).stdout
    assert not served.hub.requests


def test_an_adapters_folder_as_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lora.make(tmp_path / "mine", named=BASE)
    monkeypatch.chdir(tmp_path)
    for text in ("mine", str(folder)):
        with pytest.raises(WeightsError) as error:
            weights.find(parse(text))
        assert f"MODEL={folder}: it is a LoRA adapter of {BASE}, and no model" in str(error.value)
        assert f'[{{"name": "mine", "path": "{folder}"}}]' in str(error.value)
    (folder / "config.json").write_text("{}")  # as some trainers leave it
    with pytest.raises(WeightsError, match="it is a LoRA adapter of"):
        weights.find(parse(str(folder)))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (None, "there is no such folder"),
        ((), "it holds no adapter_config.json, so it is no LoRA adapter"),
        (("config.json", "model.safetensors"), "it holds no adapter_config.json"),
        (("adapter_config.json",), "it holds none of adapter_model.safetensors, adapter_model.bin"),
    ],
)
def test_a_folder_that_is_none(
    tmp_path: Path, names: tuple[str, ...] | None, sentence: str
) -> None:
    folder = tmp_path / "adapter"
    if names is not None:
        make_model(folder, set(names)).mkdir(exist_ok=True)
    with pytest.raises(WeightsError) as error:
        weights.find(parse_adapter(str(folder)))
    assert str(error.value).startswith(f"ENGINE_ARGS lora_modules path={folder}: {sentence}")


def test_all_of_vllms_ways_to_name_them() -> None:
    whole = {"name": "a", "path": "org/a", "base_model_name": "b"}
    assert named({"lora-modules": [whole, "b=org/b", json.dumps(module("./c", "c"))]}) == [
        whole,
        module("org/b", "b"),
        module("./c", "c"),
    ]
    assert named({"lora_modules": "a=org/a"}) == [module("org/a")]
    assert named({"lora_modules": module("org/a")}) == [module("org/a")]
    assert named({"lora_modules": None}) == named({}) == []
