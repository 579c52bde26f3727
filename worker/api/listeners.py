"""The sockets of the HTTP front, and uvicorn on them."""

from __future__ import annotations

import logging
import socket

import uvicorn

from worker.asgi import App
from worker.errors import SettingsError
from worker.settings import Settings

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn on one listener; signals are ours."""

    def __init__(self, front: App, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                front,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
                # Longer than clients and balancers keep one: who closes first loses no call.
                timeout_keep_alive=75,
            )
        )
        self._listener = listener

    async def run(self) -> None:  # type: ignore[override]
        await self._serve([self._listener])


def listeners(settings: Settings) -> list[socket.socket]:
    """The sockets for PORT and, if it is another, PORT_HEALTH."""
    host = settings.host
    if settings.api_key is None and not settings.platform_auth:
        host = "127.0.0.1"
        log.warning(
            "API_KEY is not set: only this machine is served; set API_KEY, or "
            "PLATFORM_AUTH=true where the platform checks every request"
        )
    ports = dict.fromkeys([settings.port, settings.port_health or settings.port])
    return [_listen(host, port) for port in ports]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            [f"PORT={port}: {host}:{port} can't be bound: {error.strerror}"]
        ) from None
    listener.listen(1024)
    log.info("listening on http://%s:%d", host, port)
    return listener
