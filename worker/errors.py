"""What can go wrong, and who can mend it.

TripodError
├── SettingsError      the environment: the operator mends it; exit code 2
├── ModelNotFound      the model is nowhere to be had; exit code 1
├── BadRequest         the job's input: the client mends it; the worker goes on
├── EngineRefusal      the engine's own answer in OpenAI's shape: likewise
├── JobFailed          the handler yielded an error: the handler's author mends it
├── JobTimeout         the job ran longer than it may
├── ShuttingDown       the worker was told to stop before the job ended
├── DeliveryError      the platform does not take what a job produced
│   ├── Refused            it says so
│   ├── Undelivered        it was away for too long
│   └── Lost               so the job's end never reached the client
├── UnknownSdk         the runpod SDK is not one that the job loop knows; exit code 1
├── SetupFailed        the handler's setup raised; exit code 1
└── EngineError        the engine: nobody outside can mend it
    ├── EngineStartError   it did not start; exit code 1
    └── EngineDead         it died while serving; the worker is replaced; exit code 1

Each message is one clear sentence that can be shown to a client as it stands.
"""

import json
from typing import Any

from preload.errors import first_line


class TripodError(Exception):
    """Anything that Tripod raises on purpose."""


class SettingsError(TripodError):
    """The environment is wrong; the message lists every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class BadRequest(TripodError):
    """The job's input is wrong; the message names the field, the value and what is allowed."""


class EngineRefusal(TripodError):
    """The engine refused a call to one of OpenAI's routes; the message is its error as JSON.

    Args:
        error: OpenAI's error object: `message`, `type`, `param`, and the HTTP status as `code`.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        self.error = error
        super().__init__(json.dumps(error))


class JobFailed(TripodError):
    """The handler yielded `{"error": …}`; the message is what it said, as JSON unless a text."""

    def __init__(self, error: object) -> None:
        super().__init__(error if isinstance(error, str) else json.dumps(error))


class JobTimeout(TripodError):
    """The job ran longer than JOB_TIMEOUT seconds."""


class ShuttingDown(TripodError):
    """The worker stops, and the job did not end within SHUTDOWN_TIMEOUT seconds."""


class DeliveryError(TripodError):
    """The platform does not take what a job produced."""


class Refused(DeliveryError):
    """The platform refused it; the message is its answer."""


class Undelivered(DeliveryError):
    """The platform was away for longer than DELIVERY_TIMEOUT seconds."""


class Lost(DeliveryError):
    """The end of a job did not reach the platform."""


class UnknownSdk(TripodError):
    """The installed runpod SDK differs from what the job loop was written for."""


class SetupFailed(TripodError):
    """The `setup` of the handler raised."""


class EngineError(TripodError):
    """The engine failed on this request."""


class EngineStartError(EngineError):
    """The engine did not become ready."""


class EngineDead(EngineError):
    """The engine died; no request can be served any more."""


def raised_by_handler(error: Exception) -> str:
    """What a client is told of an exception that a handler did not raise on purpose."""
    return f"the handler raised {type(error).__name__}: {first_line(error)}"
