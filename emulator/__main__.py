"""`python -m emulator [OPTIONS] -- COMMAND ARGS...`: a local Runpod to develop against."""

import asyncio
import ipaddress
import json
import logging
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import uvicorn

from emulator.app import build_app
from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.faults import BadFault, Faults, parse
from emulator.misbehaviour import Connections, watched_protocol
from emulator.store import Limits
from emulator.supervisor import Supervisor, worker_environment
from emulator.terminal import Terminal, connect_help, examples
from emulator.web import ENDPOINT_ID
from emulator.webhooks import Webhooks

EXAMPLE_INPUT = '{"input": {"prompt": "import os\\n\\ndef ", "answerType": "normal"}}'

LIMITS = Limits()

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the emulator has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def fail(sentence: str) -> typer.Exit:
    typer.echo(f"emulator: {sentence}", err=True)
    return typer.Exit(2)


def loopback(host: str) -> str:
    """The IPv4 loopback address that `host` names. Raises typer.Exit for any other."""
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = ipaddress.IPv4Address("0.0.0.0")
    if not address.is_loopback:
        raise fail(f"--host is {host!r}: only a loopback address (127.0.0.1) is allowed")
    return str(address)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises typer.Exit if the port is taken."""
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every POST of a
    # chunk costs 40 ms (Nagle's algorithm against delayed acknowledgements).
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise fail(
            f"port {port} cannot be used ({error.strerror}); choose another with --port"
        ) from None
    return listener


def parse_example(text: str) -> dict[str, Any]:
    try:
        example = json.loads(text)
    except ValueError as error:
        raise fail(f"--example-input is not JSON: {error}") from None
    if not isinstance(example, dict) or "input" not in example:
        raise fail('--example-input has no "input": it must be like {"input": {...}}')
    return example


@cli.command(context_settings={"allow_interspersed_args": False})
def main(
    command: Annotated[
        list[str] | None, typer.Argument(help="The worker's command; none: start no worker.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8008,
    host: Annotated[str, typer.Option(help="Loopback only.")] = "127.0.0.1",
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker processes.")] = 1,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EMULATOR_API_KEY", help="The only key accepted; default: any."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds from SIGTERM to SIGKILL for workers.")
    ] = 5.0,
    retention: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a job is kept once it has ended.")
    ] = LIMITS.retention,
    example_input: Annotated[
        str, typer.Option(help="JSON body that the printed examples send.")
    ] = EXAMPLE_INPUT,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="CALL:KIND", help="Misbehave, e.g. job-done:status=503,count=3."),
    ] = None,
    fault_seed: Annotated[
        int, typer.Option(help="The same seed and calls: the same calls are struck.")
    ] = 0,
) -> None:
    """Run a Runpod serverless endpoint on this machine, with COMMAND as its worker(s).

    docs/how-to/faults.md describes the faults; POST /emulator/faults adds one while it runs.
    """
    address, example = loopback(host), parse_example(example_input)
    if command and shutil.which(command[0]) is None:
        raise fail(f"command {command[0]!r} is not found or not executable")
    try:
        faults = Faults(fault_seed, [parse(text) for text in fault or []])
    except BadFault as error:
        raise fail(f"--fault {error}") from None
    listener = bind(address, port)
    logging.basicConfig(format="emulator | %(message)s", level=logging.WARNING)
    count = workers if command else 0
    limits = Limits(retention=retention, sync_retention=min(retention, LIMITS.sync_retention))
    asyncio.run(serve(listener, limits, faults, command or [], count, api_key, grace, example))


async def serve(
    listener: socket.socket,
    limits: Limits,
    faults: Faults,
    command: list[str],
    count: int,
    api_key: str | None,
    grace: float,
    example: dict[str, Any],
) -> None:
    """Serve until SIGINT or SIGTERM, then stop the workers and end; a second signal kills."""
    host, port = listener.getsockname()
    url = f"http://{host}:{port}/v2/{ENDPOINT_ID}"
    print(f"listening on {url}", flush=True)
    endpoint, webhooks = Endpoint(limits), Webhooks()
    endpoint.on_finish = webhooks.send
    worker_key = api_key or "local"

    def describe_start() -> str:
        slot = supervisor.slots[0]
        return f"{slot.worker_id} is starting: {slot.last_line or 'no output yet'}"

    terminal = Terminal(describe_start)
    supervisor = Supervisor(
        endpoint, command, count, url, log=terminal.log, api_key=worker_key, grace=grace
    )
    connections: Connections = {}
    app = build_app(
        endpoint,
        client=ClientApi(endpoint, api_key),
        list_workers=supervisor.list_workers,
        faults=faults,
        connections=connections,
    )
    server = Server(
        uvicorn.Config(
            app,
            http=watched_protocol(connections),
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=2,
            # Longer than clients and balancers keep one: who closes first loses no call.
            timeout_keep_alive=75,
        )
    )

    shown = False

    def show_examples(_: str = "") -> None:
        nonlocal shown
        if not shown:
            shown = True
            terminal.stop_progress()
            print(examples(url, example, with_key=api_key is not None), flush=True)

    stop, signals = asyncio.Event(), 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        stop.set()
        if signals > 1:
            supervisor.kill()
            server.force_exit = True

    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, on_signal)

    endpoint.on_ready = show_examples
    faults.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    serving.add_done_callback(lambda _: stop.set())
    if count:
        supervisor.start()
        terminal.start_progress()
    else:
        print(connect_help(worker_environment(url, "my-worker", "local")), flush=True)
        show_examples()
    await stop.wait()
    terminal.stop_progress()
    endpoint.close()
    await supervisor.stop()
    await webhooks.close()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    cli(prog_name="python -m emulator")
