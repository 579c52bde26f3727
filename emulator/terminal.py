"""What the emulator shows: logs and progress on stderr, URL and examples on stdout."""

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

PROGRESS_INTERVAL = 10.0


@dataclass(slots=True)
class Terminal:
    """`describe_start()` is the line shown while the first worker starts."""

    describe_start: Callable[[], str]
    _console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    _live: Live | None = None
    _ticker: asyncio.TimerHandle | None = None
    _since: float = 0.0

    def log(self, source: str, line: str) -> None:
        """One line of a worker's log, or of the emulator's own."""
        if self._live:
            self._console.print(Text(f"{source} | {line}"))
        else:
            print(f"{source} | {line}", file=sys.stderr, flush=True)

    def start_progress(self) -> None:
        """Show that a worker is starting: a spinner, or a line every 10 s without a terminal."""
        self._since = time.monotonic()
        if self._console.is_terminal:
            spinner = Spinner("dots")

            def frame() -> Spinner:
                width = self._console.width - 4
                spinner.update(text=Text(self._progress()[:width]))
                return spinner

            self._live = Live(get_renderable=frame, console=self._console, transient=True)
            self._live.start()
        else:
            self._schedule()

    def stop_progress(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        if self._ticker:
            self._ticker.cancel()
            self._ticker = None

    def _schedule(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(PROGRESS_INTERVAL, self._tick)

    def _tick(self) -> None:
        self.log("emulator", self._progress())
        self._schedule()

    def _progress(self) -> str:
        return f"{time.monotonic() - self._since:.0f} s: {self.describe_start()}"


def examples(url: str, example_input: dict[str, Any], *, with_key: bool) -> str:
    """Shell commands that work as they stand: one for /runsync, one for /run and /stream.

    `with_key`: the endpoint asks for its own key, which the shell must hold as RUNPOD_API_KEY.
    """
    key = '"Authorization: Bearer $RUNPOD_API_KEY"' if with_key else "'Authorization: Bearer local'"
    body = shlex.quote(json.dumps(example_input))
    streamed = example_input
    if isinstance(streamed["input"], dict) and "answerType" in streamed["input"]:
        streamed = {**streamed, "input": {**streamed["input"], "answerType": "stream"}}
    stream_body = shlex.quote(json.dumps(streamed))
    json_type = "-H 'Content-Type: application/json'"
    take_id = "python3 -c 'import json, sys; print(json.load(sys.stdin)[\"id\"])'"
    needs = "These need RUNPOD_API_KEY set to the key of --api-key.\n" if with_key else ""
    return f"""\
ready: {url}
for OpenAI's clients: base_url={url}/openai/v1
{needs}
One answer:

curl -s {url}/runsync -H {key} {json_type} -d {body}

A stream:

id=$(curl -s {url}/run -H {key} {json_type} -d {stream_body} | {take_id})
while reply=$(curl -s {url}/stream/$id -H {key}); do
  printf '%s\\n' "$reply"
  case $reply in '{{"status":"IN_'*) ;; *) break ;; esac
done
"""


def connect_help(environment: dict[str, str]) -> str:
    """How a worker from outside connects: the environment it needs."""
    lines = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    return f"no worker is started here; one connects with this environment:\n\n{lines}\n"
