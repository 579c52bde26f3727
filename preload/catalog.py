"""`openllm:<tag>` → repository, revision and engine settings, as OpenLLM's catalog has them.

OpenLLM's pins fit into no environment of ours, so its own program is asked, in an environment of
its own (requirements/openllm.sh). Of what the catalog holds nothing is executed.
"""

import ast
import difflib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from preload.entry import Entry
from preload.errors import WeightsError, first_line
from preload.model import Model, ModelNameError, parse
from preload.secret import without_secrets

ROOT = Path(__file__).parents[1]
OWN = ROOT / ".cache" / "openllm" / "bin"
"""Where requirements/openllm.sh installs it."""

TIMEOUT = 300.0
"""Seconds that one call of `openllm` may take; the longest clones the catalog."""

UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OSError, SyntaxError)
"""What reading an entry of another shape raises."""

_TAG = re.compile(r"^\S* +(\S+:\S+) ", re.MULTILINE)


def program() -> str | None:
    """The path of `openllm`, or None where it is not installed."""
    return shutil.which("openllm", path=OWN) or shutil.which("openllm")


def resolve(model: Model) -> Model:
    """Ask `openllm` what the tag of `model` stands for.

    Raises:
        WeightsError: in one sentence, why it can't be told.
    """
    openllm = program()
    if openllm is None:
        script = ROOT / "requirements" / "openllm.sh"
        raise WeightsError(
            f"MODEL={model}: OpenLLM, which knows what this tag names, is not installed; "
            f"install it with `sh {script}`, or name the hub id itself"
        )
    with _environment() as environment:
        try:
            entry = _entry(openllm, model, environment)
        except subprocess.TimeoutExpired as error:
            what = " ".join(error.cmd[1:])
            raise WeightsError(
                f"MODEL={model}: `openllm {what}` did not end within {error.timeout:g} s"
            ) from None
    try:
        named = parse(entry.repository, entry.revision or "")
    except ModelNameError as error:
        raise WeightsError(f"MODEL={model}: the catalog names {entry}: {error}") from None
    return Model(
        repository=named.repository, revision=named.revision, openllm=model.openllm, entry=entry
    )


@contextmanager
def _environment() -> Iterator[dict[str, str]]:
    """Ours without secrets, and with a home for OpenLLM that is gone afterwards.

    OPENLLM_TEST_REPO names a catalog that is on this machine, OPENLLM_HOME a home to keep.
    """
    inherited = without_secrets(os.environ)
    inherited.pop("PYTHONPATH", None)
    with TemporaryDirectory(prefix="openllm-") as home:
        yield {
            "OPENLLM_HOME": home,
            **inherited,
            "BENTOML_DO_NOT_TRACK": "True",
            "GIT_TERMINAL_PROMPT": "0",
        }


def _entry(openllm: str, model: Model, environment: dict[str, str]) -> Entry:
    import yaml

    assert model.openllm
    if not environment.get("OPENLLM_TEST_REPO"):
        _run([openllm, "repo", "update"], environment)
    got = _run([openllm, "model", "get", model.openllm, "--verbose"], environment)
    if got.returncode != 0:
        raise WeightsError(f"MODEL={model}: {_not_there(openllm, model.openllm, environment)}")
    _, _, listed = got.stdout.partition("\n")  # the first line says that it was found
    try:
        info = yaml.safe_load(listed)
        return _read(model.openllm, Path(info["path"]), info["bento_yaml"])
    except UNREADABLE as error:
        raise WeightsError(
            f"MODEL={model}: the catalog's entry can't be read "
            f"({type(error).__name__}: {first_line(error)}); "
            "an own bento is served with ENGINE=openllm"
        ) from None
    except yaml.YAMLError:
        raise WeightsError(f"MODEL={model}: `openllm model get` printed no YAML") from None


def _run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:  # the clone that it started too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _not_there(openllm: str, tag: str, environment: dict[str, str]) -> str:
    listed = _run([openllm, "model", "list"], environment)
    tags = _TAG.findall(listed.stdout)
    if listed.returncode != 0:
        return f"`openllm model list` failed: {_last_line(listed.stderr or listed.stdout)}"
    if not tags:
        return (
            "OpenLLM's catalog is empty or could not be fetched; it comes from GitHub, or from "
            "the checkout that OPENLLM_TEST_REPO names"
        )
    if of_it := [other for other in tags if other.startswith(f"{tag}:")]:
        return f"the catalog has several of it; name one of {', '.join(of_it)}"
    if near := difflib.get_close_matches(tag, tags, n=3, cutoff=0.4):
        return f"OpenLLM's catalog has no such tag; near are {', '.join(near)}"
    return f"OpenLLM's catalog has no such tag among its {len(tags)}; `openllm model list` shows it"


def _read(tag: str, folder: Path, bento: dict[str, Any]) -> Entry:
    service = bento["services"][0]
    models = [model for model in service["models"] if model["registry"] == "huggingface"]
    if len(models) != 1:
        raise ValueError(f"it names {len(models)} models of the hub instead of one")
    metadata = models[0]["metadata"]
    resources = service["config"].get("resources", {})
    arguments = _literals((folder / "src" / "service.py").read_text(encoding="utf-8"))
    # bento.yaml has the name in lower case, which only the hub itself takes for the same.
    name, spelt = metadata["model_id"], arguments.get("openllm_model_id")
    same = isinstance(spelt, str) and spelt.lower() == name.lower()
    return Entry(
        tag=tag,
        bento=f"{bento['name']}:{bento['version']}",
        repository=spelt if same else name,
        revision=metadata["revision"],
        excludes=metadata.get("exclude") or [],
        needs_token=any(_wants_token(variable) for variable in bento.get("envs") or []),
        gpu=resources.get("gpu_type"),
        gpus=resources.get("gpu", 0),
        engine_args={k: v for k, v in arguments.items() if not k.startswith("openllm_")},
    )


def _wants_token(variable: dict[str, str]) -> bool:
    return variable.get("name") == "HF_TOKEN" and not variable.get("value")


def _literals(source: str) -> dict[str, Any]:
    """The fields of `BentoArgs` whose defaults are literals; the others are left out."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name != "BentoArgs":
            continue
        for field in node.body:
            match field:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    with suppress(ValueError):
                        found[name] = ast.literal_eval(value)
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
