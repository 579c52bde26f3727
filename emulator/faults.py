"""Faults on purpose: the grammar of `--fault`, and which faults strike a call.

A fault is `CALL:KIND[=VALUE][,OPTION=VALUE]...`, such as `job-done:status=503,count=3`:

    CALL    job-take, job-stream, job-done, job-stop, ping; all: each of these
            run, runsync, status, stream, cancel, retry, purge-queue, health, openai;
            client: each of these
    KIND    latency=50ms            a round trip of that much, half before and half after the call
            status=503              answered with this status (400 to 599); the call has no effect
            drop=before             the connection is closed instead of an answer; the call has
            drop=after                no effect, or has it
            half                    the call has its effect; half of the answer, then closed
            outage=60s              all calls under way are cut, and each new one, for so long
            duplicate=same          jobs are handed out a second time: to the same worker, or to
            duplicate=other           another one (job-take)
            stop-signal             job-take: the job is cancelled just as it is handed out;
                                    job-done: a stop for the job that just ended;
                                    job-stop: a stop for a job that never was
            clock=+1h               the platform's clock jumps, forwards or backwards (all)
    OPTION  probability=0.1         strikes so large a part of the calls
            count=3                 strikes so many calls at most
            after=5s, for=10s       begins so long after it was added; ends so long after it began

Durations are a number and ms, s, m or h.
"""

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WORKER_CALLS = ("job-take", "job-stream", "job-done", "job-stop", "ping")
CLIENT_CALLS = (
    "run",
    "runsync",
    "status",
    "stream",
    "cancel",
    "retry",
    "purge-queue",
    "health",
    "openai",
)
CALLS = {"all": WORKER_CALLS, "client": CLIENT_CALLS} | {
    call: (call,) for call in WORKER_CALLS + CLIENT_CALLS
}
CALLS_OF_KIND = {
    "duplicate": ("job-take",),
    "stop-signal": ("job-take", "job-done", "job-stop"),
    "clock": ("all",),
}
"""Kinds that only some calls can have."""

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class BadFault(ValueError):
    """A fault that can't be understood; its text is one sentence that says what is allowed."""


@dataclass(slots=True, eq=False)
class Fault:
    """One fault. `value` is seconds, a status or a word, as its kind has it; times are seconds."""

    text: str
    call: str
    kind: str
    value: float | str | None = None
    probability: float = 1.0
    count: int | None = None
    after: float = 0.0
    lasts: float | None = None
    begin: float = 0.0
    struck: int = 0

    def active(self, now: float) -> bool:
        """Whether it may strike at this time of the loop's clock."""
        used_up = self.count is not None and self.struck >= self.count
        return self.begin <= now and not used_up and not self.over(now)

    def over(self, now: float) -> bool:
        return self.lasts is not None and now >= self.begin + self.lasts


class Faults:
    """The faults in force. Must be used inside one event loop.

    `on_begin(fault)` is called when one begins, `on_end(fault)` when its time is up or it is
    cleared. The same seed and the same order of calls give the same strikes.
    """

    def __init__(self, seed: int = 0, first: Sequence[Fault] = ()) -> None:
        self.on_begin: Callable[[Fault], None] = lambda _: None
        self.on_end: Callable[[Fault], None] = lambda _: None
        self._first = first
        self._faults: list[Fault] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._random = random.Random(seed)

    def start(self) -> None:
        """Put the first faults in force."""
        for fault in self._first:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Put a fault in force; its `after` counts from now."""
        loop = asyncio.get_running_loop()
        fault.begin = loop.time() + fault.after
        self._faults.append(fault)
        self._timers.append(loop.call_at(fault.begin, self._begin, fault))
        if fault.lasts is not None:
            self._timers.append(loop.call_at(fault.begin + fault.lasts, self.on_end, fault))

    def clear(self) -> None:
        """End every fault now."""
        for timer in self._timers:
            timer.cancel()
        cleared, self._timers, self._faults = self._faults, [], []
        for fault in cleared:
            self.on_end(fault)

    def strike(self, call: str) -> list[Fault]:
        """The faults that strike this call, in the order they were added; they are counted."""
        if not self._faults:
            return []
        now = asyncio.get_running_loop().time()
        struck = [
            fault
            for fault in self._faults
            if call in CALLS[fault.call]
            and fault.kind != "clock"
            and fault.active(now)
            and (fault.probability >= 1 or self._random.random() < fault.probability)
        ]
        for fault in struck:
            fault.struck += 1
        return struck

    def describe(self) -> list[dict[str, Any]]:
        """The body of /emulator/faults."""
        now = asyncio.get_running_loop().time()
        return [
            {"fault": fault.text, "active": fault.active(now), "struck": fault.struck}
            for fault in self._faults
        ]

    def _begin(self, fault: Fault) -> None:
        if fault.kind == "clock":
            fault.struck += 1
        self.on_begin(fault)


def parse(text: str) -> Fault:
    """Read one fault. Raises BadFault."""
    head, *options = text.split(",")
    call, colon, what = head.partition(":")
    if not colon:
        raise BadFault(f"{text!r} is no fault: it must be like job-done:status=503")
    if call not in CALLS:
        raise BadFault(f"{text!r}: call {call!r} is unknown; allowed are {', '.join(CALLS)}")
    kind, _, value = what.partition("=")
    if kind not in VALUES:
        raise BadFault(f"{text!r}: kind {kind!r} is unknown; allowed are {', '.join(VALUES)}")
    allowed = CALLS_OF_KIND.get(kind)
    if allowed and call not in allowed:
        raise BadFault(f"{text!r}: {kind} is only for {', '.join(allowed)}")
    try:
        fault = Fault(text, call, kind, VALUES[kind](kind, value))
        for option in options:
            _set_option(fault, option)
    except ValueError as error:
        raise BadFault(f"{text!r}: {error}") from None
    if kind == "outage":
        assert isinstance(fault.value, float)
        fault.lasts = fault.value
    return fault


def _set_option(fault: Fault, option: str) -> None:
    name, _, value = option.partition("=")
    if fault.kind in ("outage", "clock") and name != "after":
        raise ValueError(f"{fault.kind} takes no {name!r}, only after")
    match name:
        case "probability":
            fault.probability = _probability(value)
        case "count":
            fault.count = _whole(name, value, 1, 10**9)
        case "after":
            fault.after = duration(name, value)
        case "for":
            fault.lasts = duration(name, value)
        case _:
            raise ValueError(
                f"option {name!r} is unknown; allowed are probability, count, after, for"
            )


def duration(name: str, text: str) -> float:
    """Seconds of a duration such as 50ms. Raises ValueError with a sentence."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)):
        raise ValueError(f"{name} is {text!r}: it must be a duration such as 50ms, 5s, 2m or 1h")
    return float(match[1]) * UNITS[match[2]]


def _jump(name: str, text: str) -> float:
    if text[:1] not in ("+", "-"):
        raise ValueError(f"{name} is {text!r}: it must be a jump such as +1h or -30s")
    seconds = duration(name, text[1:])
    return -seconds if text[0] == "-" else seconds


def _status(name: str, text: str) -> float:
    return float(_whole(name, text, 400, 599))


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise ValueError(f"{name} is {text!r}: it must be a whole number from {low} to {high}")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"probability is {text!r}: it must be above 0 and at most 1")
    return value


def _one_of(*words: str) -> Callable[[str, str], str]:
    """One of these words; the first where there is none."""

    def read(name: str, text: str) -> str:
        if (text or words[0]) not in words:
            raise ValueError(f"{name} is {text!r}: it must be {' or '.join(words)}")
        return text or words[0]

    return read


def _none(name: str, text: str) -> None:
    if text:
        raise ValueError(f"{name} takes no value")


VALUES: dict[str, Callable[[str, str], float | str | None]] = {
    "latency": duration,
    "status": _status,
    "drop": _one_of("before", "after"),
    "half": _none,
    "outage": duration,
    "duplicate": _one_of("same", "other"),
    "stop-signal": _none,
    "clock": _jump,
}
"""How each kind reads its value."""
