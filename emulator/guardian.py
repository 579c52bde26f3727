"""Leaves no worker behind: a process that outlives the emulator by a moment and cleans up.

Every worker has a process group of its own, and what it starts stays in that group unless it goes
out of its way. The emulator tells the guardian the groups over a pipe (`+PID` and `-PID` lines).
When the pipe closes, however the emulator ended, what is left of the groups is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

RUN_VARIABLE = "TRIPOD_EMULATOR_RUN"
"""Set in every worker's environment; finds what was not told of yet, or left its group."""


def kill_groups(leaders: set[int], run: str | None = None) -> None:
    """SIGKILL every process of these groups, with all descendants, until none is left.

    With `run`, also every process whose environment has a RUN_VARIABLE that starts so.
    """
    for _ in range(100):
        victims = set(_members(leaders, run))
        if not victims:
            return
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        time.sleep(0.02)


def _members(leaders: set[int], run: str | None) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = os.getpgid(process.pid) in leaders
            if not ours and run is not None:
                ours = process.environ().get(RUN_VARIABLE, "").startswith(run)
            if ours:
                yield process
                yield from process.children(recursive=True)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue


class Guardian:
    """The emulator's end of the pipe."""

    def __init__(self, run: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, run],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, leader: int) -> None:
        self._tell(f"+{leader}\n")

    def release(self, leader: int) -> None:
        self._tell(f"-{leader}\n")

    def close(self) -> None:
        """Have it clean up what is left, and wait for that."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=15)

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def main() -> None:
    leaders: set[int] = set()
    for line in sys.stdin:
        if line[0] == "+":
            leaders.add(int(line[1:]))
        else:
            leaders.discard(int(line[1:]))
    kill_groups(leaders, sys.argv[1])


if __name__ == "__main__":
    main()
