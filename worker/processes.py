"""Child processes: see to it that none is left."""

from contextlib import suppress

import psutil


def end_descendants(grace: float = 3.0) -> None:
    """End every process below this one: SIGTERM, after `grace` seconds SIGKILL."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace)
