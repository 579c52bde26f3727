"""`python -m worker try`, and edits that are picked up while the engine stays loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, START, Output, eventually, stop, worker_environment

pytestmark = pytest.mark.engine


def answers(output: Output) -> list[dict[str, Any]]:
    """The JSON lines; the question for the next prompt stands before some of them."""
    found = (line[line.find('{"text"') :] for line in output.lines if '{"text"' in line)
    return [json.loads(line) for line in found]


def test_the_next_job_uses_the_edited_code_and_the_loaded_engine(tmp_path: Path) -> None:
    for package in ("worker", "preload"):
        shutil.copytree(ROOT / package, tmp_path / package)
    command = [sys.executable, "-m", "worker", "try", "import os", "--reload"]
    process = subprocess.Popen(
        [*command, "--options", '{"max_tokens": 8, "ignore_eos": true, "temperature": 0}'],
        cwd=tmp_path,
        env=worker_environment(MODE_TO_RUN="pod"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = Output(process)
    assert process.stdin
    try:
        eventually(lambda: answers(output) or process.poll() is not None, START, "an answer")
        [first] = answers(output)
        assert first["usage"]["completion_tokens"] == 8

        chunks = tmp_path / "worker" / "job" / "chunks.py"
        chunks.write_text(chunks.read_text().replace('{"text": delta.text}', '{"text": "edited"}'))
        handler = tmp_path / "worker" / "handler.py"
        good = handler.read_text()
        handler.write_text(good + "\nthis is no Python\n")
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: output.find("worker.handler does not load"), 30, "the complaint")

        handler.write_text(good + "\n# mended\n")
        process.stdin.write("another prompt\n")
        process.stdin.flush()
        eventually(lambda: len(answers(output)) > 1, 30, "the second answer")
        assert answers(output)[1]["text"] == "edited"
        assert sum("ready after" in line for line in output.lines) == 1

        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            stop(process)
