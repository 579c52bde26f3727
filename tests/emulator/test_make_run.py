"""`make run` as a new user types it."""

import os
import re
import signal
import subprocess

import psutil
import pytest

from tests.support import START, eventually, left, start, stop

pytestmark = pytest.mark.engine


def test_make_run_prints_commands_that_work_and_ctrl_c_leaves_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RUNPOD_", "MAKE"))}
    process, output = start(["make", "run", "PORT=0"], environment)
    try:
        eventually(
            lambda: (
                output.find("ready: http://")
                or output.find("exited with code")
                or process.poll() is not None
            ),
            START,
            "the worker's readiness",
        )
        assert output.find("ready: http://"), output.text()
        shown = output.text()[output.text().index("ready: http://") :]
        commands = shown[shown.index("curl") :]
        assert "/runsync" in commands
        assert "/stream/" in commands
        script = re.sub(r"^[A-Z].*:$", "", commands, flags=re.MULTILINE)
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
        assert ran.stdout.count('"COMPLETED"') == 2, ran.stdout + ran.stderr
        assert '"finish_reason"' in ran.stdout

        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 3
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: everything in the foreground
        process.wait(30)
        eventually(lambda: not left(family), 10, "no process is left")
    finally:
        if process.poll() is None:
            stop(process)
