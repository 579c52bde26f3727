"""httpx over an ASGI app in this process, streaming; httpx's own transport collects everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import httpx

from worker.asgi import App, Message


class StreamingASGITransport(httpx.AsyncBaseTransport):
    """Call `app` without a socket. Closing a response is a client that hangs up."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.split(b"?")[0],
            "query_string": request.url.query,
            "server": (request.url.host, request.url.port),
            "client": ("127.0.0.1", 0),
            "root_path": "",
        }
        exchange = _Exchange(await request.aread())
        exchange.run(self._app(scope, exchange.receive, exchange.send))
        try:
            await exchange.until_started()
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(exchange.status, headers=exchange.headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request to the app and its answer; parts that pile up are read as one."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._body: bytes | None = body
        self._parts: list[bytes] = []
        self._changed = asyncio.Event()
        self._complete = False
        self._hung_up = asyncio.Event()
        self._task: asyncio.Task[None]

    def run(self, call: Awaitable[None]) -> None:
        self._task = asyncio.ensure_future(call)
        self._task.add_done_callback(lambda _: self._changed.set())

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        self._changed.set()

    async def until_started(self) -> None:
        while not self.status:
            await self._change()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            if self._parts:
                parts, self._parts = self._parts, []
                yield b"".join(parts)
            elif self._complete:
                return
            else:
                await self._change()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._task.done() and not self._complete and not self._parts:
            error = None if self._task.cancelled() else self._task.exception()
            raise httpx.RemoteProtocolError("the app ended without an answer") from error

    async def aclose(self) -> None:
        self._hung_up.set()
        if not self._complete:
            self._task.cancel()
        await asyncio.wait([self._task])
