"""How far the download is: a bar in a terminal, a line per tenth elsewhere."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]
"""Called with the number of bytes that came; fewer than none if some must come again."""


@contextmanager
def shown(total: int) -> Iterator[Advance]:
    """Show the way to `total` bytes on stderr; threads may call what this yields."""
    if not sys.stderr.isatty():
        yield PlainLines(total)
        return
    columns = (
        TextColumn("fetching"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)


class PlainLines:
    """Prints a line whenever another tenth of `total` bytes is there."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._tenths = 0
        self._lock = threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done += size
            tenths = 10 * self._done // self._total if self._total else 10
            if tenths > self._tenths:
                self._tenths = tenths
                share = f"{10 * tenths:3} %, {decimal(self._done)} of {decimal(self._total)}"
                print(f"fetched {share}", file=sys.stderr, flush=True)


def bar_for(advance: Advance) -> type:
    """The class that huggingface_hub takes in place of tqdm: it passes a file's bytes on."""

    class Bar:
        def __init__(self, **_: object) -> None:
            """One display serves all files, so what tqdm would be told is of no use."""

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

        def update(self, size: float) -> None:
            """`size` more bytes are written."""
            advance(int(size))

        def update_transfer(self, size: float) -> None:
            """Bytes on the wire: they count when they are written."""

        def set_postfix_str(self, text: str, refresh: bool = False) -> None:
            """The display knows the speed itself."""

        set_transfer_postfix_str = set_postfix_str

    return Bar
