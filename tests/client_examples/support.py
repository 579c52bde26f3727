"""Running the examples, and a server that answers as the test says."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support import ROOT

EXAMPLES = ROOT / "client_examples"
KEY = "test"
LAUNCHERS = {".py": [sys.executable], ".sh": ["bash"], ".mjs": ["node"]}
PROGRAMS = sorted(
    path.name
    for path in EXAMPLES.iterdir()
    if path.suffix in LAUNCHERS and path.name != "endpoint.py"
)


def command(program: str, *arguments: str) -> list[str]:
    path = EXAMPLES / program
    return [*LAUNCHERS[path.suffix], str(path), *arguments]


def environment(url: str = "http://127.0.0.1:9/v2/local", **variables: str) -> dict[str, str]:
    """The environment of a user who has set all three variables for the endpoint at `url`."""
    base, _, endpoint_id = url.rpartition("/")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    settings = {
        "RUNPOD_API_KEY": KEY,
        "RUNPOD_ENDPOINT_ID": endpoint_id,
        "RUNPOD_BASE_URL": base,
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "error",
    }
    return clean | settings | variables


def run(
    program: str,
    *arguments: str,
    url: str = "http://127.0.0.1:9/v2/local",
    stdin: str = "",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run one example to its end."""
    return subprocess.run(
        command(program, *arguments),
        env=environment(url, **variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


class Running:
    """A started example; `out` and `err` are what it has written so far."""

    def __init__(self, folder: Path, url: str, program: str, *arguments: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command(program, *arguments), env=environment(url), stdout=out, stderr=err
            )

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")


class Stub:
    """A server that gives its replies in turn, and the last one again and again.

    A reply is (status, JSON or text); status 0 hangs up without a word. `seen` are the requests.
    """

    def __init__(self, *replies: tuple[int, Any]) -> None:
        self.replies, self.seen, self.url = list(replies), [], ""
        self._lock = threading.Lock()

    def next(self, request: str) -> tuple[int, Any]:
        with self._lock:
            self.seen.append(request)
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def stub(*replies: tuple[int, Any]) -> Iterator[Stub]:
    script = Stub(*replies)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = script.next(f"{self.command} {self.path}")
            if not status:
                return
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}/v2/local"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
