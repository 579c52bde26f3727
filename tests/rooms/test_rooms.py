"""The plan of the rooms is a check: `make lint` fails on an import against it."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("worker", "preload", "emulator", "benchmarks")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "COLUMNS": "400"},
    )


def test_the_code_keeps_to_the_plan(copy: Path) -> None:
    ran = lint(copy)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("preload/model.py", "import worker.errors", "preload imports nothing of worker"),
        ("worker/handler.py", "import emulator.jobs", "what ships imports nothing"),
        ("worker/api/front.py", "import worker.pod.ssh", "the modes know nothing of each other"),
        ("worker/job/types.py", "import worker.engines.base", "the engines stand on job"),
        ("worker/settings.py", "import worker.engines", "settings"),
        ("worker/engines/servers/gguf.py", "import worker.engines.vllm", "the engines know"),
        ("worker/engines/servers/mlc.py", "import worker.engines.servers.tabby", "the kinds"),
        ("worker/engines/base.py", "def f():\n    import vllm", "imports vllm"),
        ("worker/startup.py", "import runpod", "imports runpod"),
        ("emulator/jobs.py", "import worker.settings", "the emulator takes only"),
        (
            "emulator/jobs.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import emulator.app",
            "no package has a circle, types included",
        ),
        ("worker/new_room.py", "", "the modes know nothing of each other"),
    ],
)
def test_an_import_against_the_plan_fails(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        ran = lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    broken = [said for said in ran.stdout.splitlines() if " BROKEN" in said]
    assert any(contract in said for said in broken), ran.stdout


def test_the_drawing_says_the_same_sentences() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    drawing = " ".join((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split())
    sentences = [part for each in contracts["contracts"] for part in each["name"].split("; ")]
    assert [sentence for sentence in sentences if sentence not in drawing] == []


def test_no_product_file_is_over_350_lines() -> None:
    for package in ("worker", "preload", "emulator", "handlers"):
        for file in (ROOT / package).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file


def test_setup_leaves_no_package_to_compile() -> None:
    for name in ("vllm", "torch", "transformers", "runpod"):
        found = importlib.util.find_spec(name)
        assert found
        assert found.origin
        assert Path(importlib.util.cache_from_source(found.origin)).exists(), name
