"""What a kind of server is: how it is started, when it is ready, what it calls things."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from preload.weights import Weights
from worker.engines import options
from worker.engines.servers.dialects import Dialect
from worker.errors import EngineStartError
from worker.processes import find_program
from worker.settings import Settings


class ServerKind:
    """One kind of server; a subclass says what differs.

    Class attributes:
        name: what ENGINE calls it.
        program: what starts it, on PATH or in .cache; None where Tripod does not start it.
        ready: the path that answers 200 once it serves.
        dialect: how it wants to be asked; None where the server itself has to be asked.
        ours: options that Tripod sets, and the variable that sets them.
        auto_slots: requests at once that CONCURRENCY_MODIFIER=auto asks for at most.
    """

    name: ClassVar[str]
    program: ClassVar[str | None] = None
    ready: ClassVar[str] = "/v1/models"
    dialect: ClassVar[Dialect | None] = None
    ours: ClassVar[Mapping[str, str]] = {}
    auto_slots: ClassVar[int]

    def __init__(self, settings: Settings, weights: Weights | None) -> None:
        self.settings = settings
        self.weights = weights
        self.max_model_len = settings.max_model_len
        wanted = settings.concurrency_modifier
        # It bounds jobs of the queue; over HTTP the engine takes what fits.
        over_http = settings.mode_to_run == "api"
        self.slots = self.auto_slots if over_http or wanted == "auto" else wanted
        self.model_name = settings.served_model_name or settings.model
        self.key = settings.engine_api_key.get_secret_value() if settings.engine_api_key else None
        self.backends: list[str] = []

    def command(self, program: str, port: int) -> list[str]:
        """The command line that serves on the loopback's `port`."""
        raise NotImplementedError

    def variables(self) -> dict[str, str]:
        """What the server's environment holds beside ours."""
        return {}

    def report(self, lines: list[str]) -> None:
        """Log what the server's first lines tell."""

    @classmethod
    def argument_problems(cls, args: dict[str, Any]) -> list[str]:
        """One line for each name in ENGINE_ARGS that the server does not know or Tripod sets."""
        if not args:
            return []
        if cls.program is None:
            return ["a server that Tripod does not start takes no options from here"]
        program = find_program(cls.program)
        if program is None:
            return [f"{cls.program} is not installed here"]
        asked = dashed_names(args)
        known: set[str] = set()
        if asked.keys() - cls.ours.keys():  # else the program need not be started
            known |= cls.known_options(program)
            known |= set(map(options.dashed, known))
        return options.problems(asked, known, cls.ours, cls.name)

    @classmethod
    def known_options(cls, program: str) -> frozenset[str]:
        """The names that ENGINE_ARGS may hold, as the server's own parser lists them."""
        return option_names(program, "--help")


@cache
def option_names(program: str, *arguments: str) -> frozenset[str]:
    """The long options that a program's help lists, without their dashes."""
    names: set[str] = set()
    for line in output(program, *arguments).splitlines():
        if line.lstrip().startswith("-"):
            # Two spaces end the names, unless a comma says that more of them follow.
            head = re.split(r"(?<=[^,\s])\s{2,}", line.strip())[0]
            names |= set(re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", head))
    return frozenset(names)


def output(program: str, *arguments: str) -> str:
    """What a program writes.

    Raises:
        EngineStartError: it does not run, or not end within a minute.
    """
    try:
        ran = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineStartError(f"{program} {' '.join(arguments)} did not answer: {error}") from None
    return ran.stdout + ran.stderr


def dashed_names(args: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their names as a command line has them."""
    return {options.dashed(name): value for name, value in args.items()}


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """`{"a": 1, "b": true, "c": false}` → `--a 1 --b --no-c`; a list repeats its option."""
    arguments: list[str] = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                arguments.append(f"--{name}" if item else f"--no-{name}")
            elif item is not None:
                text = json.dumps(item) if isinstance(item, dict) else str(item)
                arguments += [f"--{name}", text]
    return arguments
