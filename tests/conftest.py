"""What is set up once for the whole run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Endpoint, endpoint

AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


def pytest_configure(config: pytest.Config) -> None:
    """Have Linux share the cores out by process instead of by session while tests run, as root.

    By session, Linux 6.18 lets vLLM's processes, which spin, keep two cores from those of other
    sessions, an ssh login among them, and from its own threads for seconds at a time.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background of a script; programs that tests interrupt would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # one of xdist's processes; the first one sees to it
        return
    if os.access(AUTOGROUP, os.W_OK) and AUTOGROUP.read_text(encoding="ascii").strip() == "1":
        AUTOGROUP.write_text("0", encoding="ascii")
        config.add_cleanup(share_by_session)


def share_by_session() -> None:
    AUTOGROUP.write_text("1", encoding="ascii")


def pytest_report_header() -> str | None:
    if AUTOGROUP.exists():
        return f"kernel.sched_autogroup_enabled: {AUTOGROUP.read_text(encoding='ascii').strip()}"
    return None


@pytest.fixture(scope="session")
def local() -> Iterator[Endpoint]:
    """The emulator with one real worker, many jobs at once."""
    with endpoint(CONCURRENCY_MODIFIER="64", VLLM_API_KEY="asked of nobody") as served:
        yield served
