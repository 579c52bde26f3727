"""What the container runs: `python -m worker`.

Exit codes: 0 stopped as told, 1 the engine or the model failed, 2 the settings are wrong.
"""

import json
import logging
import os
import sys

from worker import modes, processes, settings
from worker.errors import SettingsError

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


def main() -> int:
    for name, value in SDK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    _log_to_stdout(JsonLines() if os.environ.get("RUNPOD_ENDPOINT_ID") else PlainLines())
    try:
        return modes.run(settings.load())
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    finally:
        processes.end_descendants()


def _log_to_stdout(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    for package in ("worker", "preload", "__main__"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A half-loaded engine leaves threads behind that a normal exit would wait for.
    os._exit(code)
