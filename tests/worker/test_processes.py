"""The one supervisor of child processes."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import soon
from worker.processes import Child


def child(code: str, *, keeps_output: bool = True, noise: str | None = None) -> Child:
    command = [sys.executable, "-u", "-c", code]
    return Child("a program", command, dict(os.environ), keeps_output=keeps_output, noise=noise)


async def test_its_code_and_its_last_lines() -> None:
    program = child("print('one'); print('GET /health'); print('two'); exit(3)", noise="GET ")
    assert await program.run() == 3
    assert list(program.lines) == ["one", "two"]
    assert program.last_lines() == "\n    one\n    two"
    assert await child("").run() == 0


async def test_a_signal_is_a_negative_code() -> None:
    assert await child("import os; os.kill(os.getpid(), 9)").run() == -9


async def test_what_it_started_ends_with_it() -> None:
    program = child(
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)\n"
    )
    assert await program.run() == 0
    started = int(program.lines[0])
    await soon(lambda: not psutil.pid_exists(started), 5, "the end of what it started")


@pytest.mark.parametrize("ends", [True, False])
async def test_stop_asks_first(ends: bool) -> None:
    program = child(
        "import signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: exit(7) if {ends} else None)\n"
        "print('up')\n"
        "while True: time.sleep(0.05)\n"
    )
    program.start()
    await soon(lambda: program.lines, 20, "its line")
    program.stop(5 if ends else 0.2)
    await program.ended.wait()
    assert program.code == (7 if ends else -9)
    program.stop()


async def test_a_stopped_process_is_killed_too() -> None:
    program = child("import os, signal; print('up'); os.kill(os.getpid(), signal.SIGSTOP)")
    program.start()
    await soon(lambda: program.lines, 20, "its line")
    program.kill()
    await program.ended.wait()
    assert program.code == -9


async def test_what_cant_be_run_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Child("nothing", [str(tmp_path / "nothing")], {}).start()


async def test_it_can_be_started_again() -> None:
    program = child("print('again')")
    assert [await program.run(), await program.run()] == [0, 0]
    assert list(program.lines) == ["again", "again"]
