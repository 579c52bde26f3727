"""What the container runs: `python -m worker`; in a pod also `python -m worker try "a prompt"`.

Exit codes: 0 stopped as told, 1 the engine or the model failed, 2 the settings are wrong.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from preload.weights import WeightsError
from worker import configuration, modes, processes
from worker.errors import SettingsError, TripodError

SDK_DEFAULTS = {
    # The SDK logs every chunk at its default level.
    "RUNPOD_LOG_LEVEL": "WARN",
    # The SDK's system checks end the worker when it can't reach a public name server.
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
}


class JsonLines(logging.Formatter):
    """A line as the platform expects it: `{"requestId", "message", "level"}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "requestId": getattr(record, "job", None),
            "message": super().format(record),
            "level": record.levelname,
        }
        return json.dumps(line)


class PlainLines(logging.Formatter):
    """`INFO   | job | message`, as the SDK writes it off the platform."""

    def format(self, record: logging.LogRecord) -> str:
        job = getattr(record, "job", None)
        message = super().format(record)
        return f"{record.levelname:7}| {f'{job} | ' if job else ''}{message}"


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.callback(invoke_without_command=True)
def container(context: typer.Context) -> None:
    """Run what MODE_TO_RUN says. docs/reference/variables.md lists the variables."""
    if context.invoked_subcommand is None:
        sys.exit(main(lambda: modes.run(configuration.load(os.environ), os.environ)))


@cli.command("try")
def try_out(
    prompt: Annotated[str | None, typer.Argument(help="The prompt of the job.")] = None,
    input_: Annotated[
        str | None, typer.Option("--input", help="The whole input of the job, as JSON.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Ask for a stream.")] = False,
    options: Annotated[str, typer.Option(help="The job's options, as JSON.")] = "{}",
    reload: Annotated[
        bool, typer.Option(help="Go on with jobs from standard input and the edited handler.")
    ] = False,
) -> None:
    """Load the engine and run one job through the handler, without a queue."""
    from worker import tryout

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if (prompt is None) == (input_ is None):
        raise typer.BadParameter("give either a prompt or --input")
    job_input = {
        "prompt": prompt,
        "answerType": "stream" if stream else "normal",
        "options": _json("--options", options),
    }
    if input_ is not None:
        job_input = _json("--input", input_)
    sys.exit(main(lambda: tryout.run(configuration.load(os.environ), job_input, reload=reload)))


def main(run: Callable[[], int]) -> int:
    """Set up the process, run, and turn what went wrong into an exit code."""
    for name, value in SDK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    _log_to_stdout(JsonLines() if os.environ.get("RUNPOD_ENDPOINT_ID") else PlainLines())
    try:
        return run()
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    except (TripodError, WeightsError) as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        processes.end_descendants()


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option} must be a JSON object")
    return value


def _log_to_stdout(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    for package in ("worker", "preload", "__main__"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request


if __name__ == "__main__":
    try:
        cli(prog_name="python -m worker")
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # A half-loaded engine leaves threads behind that a normal exit would wait for.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
