"""A repository as the hub holds it, a hub in a thread, and `python -m preload` as a process."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.preload.hub import Hub, Running
from tests.support import ROOT

MIB = 1 << 20
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIG = SHARDS[1]
NEEDED = {
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "modeling_tiny.py",
    "tokenizer.json",
    "tokenizer_config.json",
    *SHARDS,
}
NOT_NEEDED = {
    ".gitattributes",
    "README.md",
    "picture.png",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
}


def make_model(folder: Path, names: set[str], big: int = 24 * MIB) -> Path:
    """Files of those names; the second shard has `big` bytes, so that it comes in pieces."""
    some = random.Random(1)
    for name in sorted(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(some.randbytes(big if name == BIG else 1000))
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    for name in names & {"config.json", "model.safetensors.index.json"}:
        (folder / name).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with everything that inference needs, and much that it does not."""
    return make_model(tmp_path_factory.mktemp("repository"), NEEDED | NOT_NEEDED)


@pytest.fixture
def served(repository: Path) -> Iterator[Running]:
    """A hub with org/tiny, and org/closed behind a gate."""
    hub = Hub(token="hf_right")
    hub.add("org/tiny", repository, tags=("v1",))
    hub.add("org/closed", repository, gated=True)
    with Running(hub) as running:
        yield running


@dataclass
class Preload:
    """Runs `python -m preload` and other code with an environment of its own."""

    url: str
    home: Path
    ran: list[subprocess.CompletedProcess[str]] = field(default_factory=list)

    @property
    def into(self) -> Path:
        return self.home / "models"

    @property
    def baked(self) -> Path:
        return self.into / "org--tiny"

    @property
    def partial(self) -> Path | None:
        """The folder of a download that has not ended."""
        return next(iter(self.into.glob(".partial-*")), None)

    def environment(self, **variables: str) -> dict[str, str]:
        """Nothing of this process but PATH: no proxy, no token, no cache."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "HF_ENDPOINT": self.url,
            "PYTHONPATH": str(ROOT),
            "MODEL": "org/tiny",
            **variables,
        }

    def start(self, stderr: int = subprocess.PIPE, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "preload", "--into", str(self.into)],
            env=self.environment(**variables),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def __call__(self, code: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
        """`python -m preload --into ...`, after running `code` in the same process."""
        command = f"{code}\nimport sys, runpy\nsys.argv[1:] = ['--into', {str(self.into)!r}]\n"
        command += "runpy.run_module('preload', run_name='__main__', alter_sys=True)\n"
        return self.python(command, **variables)

    def python(self, code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(**variables),
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        self.ran.append(done)
        return done


@pytest.fixture
def preload(served: Running, tmp_path: Path) -> Preload:
    return Preload(served.url, tmp_path)


@pytest.fixture
def refused(preload: Preload) -> Callable[..., str]:
    """Run it with those variables, see that it fails cleanly, and return its one sentence."""

    def run(code: str = "", **variables: str) -> str:
        done = preload(code, **variables)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("fetched ")]
        assert done.returncode == 1, done
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("preload: ")
        whole = [path for path in preload.into.glob("*") if not path.name.startswith(".partial-")]
        assert whole == []
        return lines[0].removeprefix("preload: ")

    return run
