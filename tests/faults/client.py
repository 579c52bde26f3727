"""Jobs whose right answer is known, and a client that checks what became of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support import AUTH

RUNNING = {"IN_QUEUE", "IN_PROGRESS"}
CODE = "import os\n\ndef "


@dataclass(frozen=True)
class Ask:
    """A job's input, the text of its only right answer, and how that is read from an output."""

    kind: str
    text: str
    input: Any
    read: Callable[[list[Any]], str]


def known(number: int, words: int) -> str:
    """JSON of a text that no other number has, and in which no part stands twice."""
    return json.dumps(" ".join(f"{number}.{word}" for word in range(words)))


def _forced(text: str) -> dict[str, Any]:
    """Options by which the engine can only answer with this JSON."""
    schema = {"name": "known", "schema": {"const": json.loads(text)}}
    return {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "max_tokens": 1000,
        "temperature": 0,
    }


def normal(number: int) -> Ask:
    text = known(number, 24)
    job_input = {"prompt": CODE, "answerType": "normal", "options": _forced(text)}
    return Ask("normal", text, job_input, joined)


def stream(number: int, words: int = 24) -> Ask:
    text = known(number, words)
    job_input = {"prompt": CODE, "answerType": "stream", "options": _forced(text)}
    return Ask("stream", text, job_input, joined)


def chat(number: int) -> Ask:
    """OpenAI's route, answered with text of server-sent events."""
    text = known(number, 24)
    call = {"messages": [{"role": "user", "content": CODE}], "stream": True, **_forced(text)}
    job_input = {"openai_route": "/v1/chat/completions", "openai_input": call}
    return Ask("openai", text, job_input, of_events)


def answer_of(ask: Ask, output: list[Any]) -> str:
    return ask.read(output).strip()


def joined(chunks: list[Any]) -> str:
    """The text of a stream; a repetition says by its `offset` what it repeats. A gap is `?`."""
    text = ""
    for chunk in chunks:
        offset = chunk.get("offset", len(text))
        text = text[:offset].ljust(offset, "?") + chunk["text"]
    return text


def of_events(chunks: list[str]) -> str:
    """The text of OpenAI's events."""
    lines = [line.removeprefix("data: ") for line in "".join(chunks).splitlines() if line]
    assert lines[-1] == "[DONE]", lines[-3:]
    deltas = [json.loads(line)["choices"] for line in lines[:-1]]
    return "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices)


class Client:
    """A client of the emulator at `url`. Calls that fail are made again, as a client would."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, headers=AUTH, timeout=120, trust_env=False)
        self._emulator = url.replace("/v2/local", "/emulator")

    async def _call(self, method: str, path: str, **body: Any) -> Any:
        while True:
            answer = await self.http.request(method, path, **body)
            if answer.status_code < 500:
                answer.raise_for_status()
                return answer.json()
            await asyncio.sleep(0.2)

    async def run(self, job_input: Any, **body: Any) -> str:
        answer = await self._call("POST", "/run", json={"input": job_input, **body})
        return str(answer["id"])

    async def status(self, job: str) -> dict[str, Any]:
        return dict(await self._call("GET", f"/status/{job}"))

    async def finished(self, job: str, timeout: float = 120) -> dict[str, Any]:
        """The job's status once it is final."""
        async with asyncio.timeout(timeout):
            while True:
                status = await self.status(job)
                if status["status"] not in RUNNING:
                    return status
                await asyncio.sleep(0.1)

    async def chunks(self, job: str) -> AsyncIterator[Any]:
        """The outputs of a job as they come."""
        while True:
            news = await self._call("GET", f"/stream/{job}")
            for chunk in news["stream"]:
                yield chunk["output"]
            if not news["stream"] and news["status"] not in RUNNING:
                return

    async def streamed(self, job: str, timeout: float = 120) -> list[Any]:
        async with asyncio.timeout(timeout):
            return [chunk async for chunk in self.chunks(job)]

    async def cancel(self, job: str) -> None:
        await self._call("POST", f"/cancel/{job}")

    async def retry(self, job: str) -> None:
        await self._call("POST", f"/retry/{job}")

    async def workers(self) -> list[dict[str, Any]]:
        return list(await self._call("GET", f"{self._emulator}/workers"))

    async def add_fault(self, text: str) -> None:
        await self._call("POST", f"{self._emulator}/faults", json={"fault": text})

    async def faults(self) -> list[dict[str, Any]]:
        return list(await self._call("GET", f"{self._emulator}/faults"))

    async def end_faults(self) -> None:
        await self._call("DELETE", f"{self._emulator}/faults")

    @asynccontextmanager
    async def faulty(self, *faults: str) -> AsyncIterator[None]:
        """The platform with these faults; each must have struck by the end."""
        for fault in faults:
            await self.add_fault(fault)
        try:
            yield
            missed = [fault["fault"] for fault in await self.faults() if not fault["struck"]]
        finally:
            await self.end_faults()
        assert not missed, f"no call was struck by {missed}"
