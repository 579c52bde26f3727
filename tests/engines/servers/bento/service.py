"""The bundled model as a bento: a llama-server of its own, and its routes below `mount`."""

import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator

import bentoml
import httpx
import pydantic
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


class BentoArgs(pydantic.BaseModel):
    """What `bentoml build --arg` gives it."""

    program: str
    gguf: str
    context: int = 2048
    slots: int = 4
    mount: str = "/v1"


arguments = bentoml.use_arguments(BentoArgs)


async def forward(request: Request) -> StreamingResponse:
    """Hand a request on to llama-server, and its answer back as it comes."""
    client: httpx.AsyncClient = request.app.state.client
    sent = client.build_request(
        request.method,
        request.url.path,
        content=await request.body(),
        headers={"content-type": "application/json"},
    )
    answer = await client.send(sent, stream=True)

    async def body() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(answer):
            async for piece in answer.aiter_raw():
                yield piece

    return StreamingResponse(body(), answer.status_code, media_type=answer.headers["content-type"])


app = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])


@bentoml.asgi_app(app, path=arguments.mount)
@bentoml.service(name="tiny", traffic={"timeout": 300}, workers=1)
class Tiny:
    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {
            "--model": arguments.gguf,
            "--alias": "tiny",
            "--host": "127.0.0.1",
            "--port": port,
            "--ctx-size": arguments.context * arguments.slots,
            "--parallel": arguments.slots,
            "--threads": 1,
        }
        words = [str(word) for option in options.items() for word in option]
        self.server = subprocess.Popen([arguments.program, "--offline", *words])
        url = f"http://127.0.0.1:{port}"
        while not self._answers(url):
            if self.server.poll() is not None:
                raise RuntimeError(f"llama-server ended with code {self.server.returncode}")
            time.sleep(0.1)
        app.state.client = httpx.AsyncClient(base_url=url, timeout=None)

    def _answers(self, url: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        return False

    @bentoml.on_shutdown
    def end(self) -> None:
        self.server.terminate()
        self.server.wait()
