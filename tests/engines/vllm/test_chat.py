"""Our `messages` and OpenAI's chats are one: template, thinking, tools; asked of one engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import Endpoint, endpoint

pytestmark = pytest.mark.engine

FILES = Path(__file__).parent / "chat"
MESSAGES = [{"role": "user", "content": "import os"}]
OPTIONS = {"temperature": 0, "max_tokens": 40}
ENGINE_ARGS = {
    "chat_template": str(FILES / "template.jinja"),
    "chat_template_content_format": "openai",
    "default_chat_template_kwargs": {"name": "__init__(self"},
    "reasoning_parser_plugin": str(FILES / "thinks.py"),
    "reasoning_parser": "thinks",
    "tool_call_parser": "hermes",
    "enable_auto_tool_choice": True,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "description": "the weather at a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Paris", "Rome"]}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
]
WITHOUT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def thinking() -> Iterator[Endpoint]:
    with endpoint(CONCURRENCY_MODIFIER="4", ENGINE_ARGS=json.dumps(ENGINE_ARGS)) as local:
        yield local


def ours(local: Endpoint, *, stream: bool, options: Any = None, **asked: Any) -> dict[str, Any]:
    """Our answer: its chunks as one."""
    answer_type = "stream" if stream else "normal"
    job_input = {"messages": MESSAGES, "answerType": answer_type, "options": OPTIONS} | asked
    job_input["options"] = OPTIONS | (options or {})
    status = local.runsync(job_input)
    assert status["status"] == "COMPLETED", status
    return one(status["output"])


def openai(local: Endpoint, *, stream: bool = True, **asked: Any) -> dict[str, Any]:
    """The answer of vLLM's own route, as our chunks joined."""
    body = {"messages": MESSAGES, **OPTIONS, **asked}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    status = local.runsync({"openai_route": "/v1/chat/completions", "openai_input": body})
    assert status["status"] == "COMPLETED", status
    if stream:
        lines = "".join(status["output"]).splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    else:
        events = status["output"]
    chunks: list[dict[str, Any]] = []
    for event in events:
        for choice in event["choices"]:
            said = choice["delta"] if stream else choice["message"]
            calls = said.get("tool_calls") or []
            chunks.append(
                {
                    "text": said.get("content") or "",
                    "reasoning": said.get("reasoning") or "",
                    "tool_calls": [{"index": i, **call} for i, call in enumerate(calls)],
                    "finish_reason": choice["finish_reason"],
                }
            )
        if event.get("usage"):
            chunks[-1]["usage"] = event["usage"]
    return one(chunks)


def one(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    calls: dict[int, dict[str, str]] = {}
    for piece in (piece for chunk in chunks for piece in chunk.get("tool_calls", [])):
        call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
        for name in call:
            call[name] += piece["function"].get(name, "")
    return {
        "text": "".join(chunk["text"] for chunk in chunks),
        "reasoning": "".join(chunk.get("reasoning", "") for chunk in chunks),
        "calls": list(calls.values()),
        "finish_reason": chunks[-1]["finish_reason"],
        "tokens": chunks[-1]["usage"]["prompt_tokens"],
    }


@pytest.mark.parametrize("stream", [False, True], ids=["normal", "stream"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        WITHOUT_THINKING,
        {"chat_template_kwargs": {"name": "open_file(self, name"}},
        {"stop": ["\n"]},
        {"max_tokens": 2},
    ],
    ids=str,
)
def test_messages_are_answered_as_by_openais_route(
    thinking: Endpoint, stream: bool, options: dict[str, Any]
) -> None:
    answer = ours(thinking, stream=stream, options=options)
    assert answer == openai(thinking, stream=stream, **options)


def test_what_the_model_thinks_stands_beside_its_text(thinking: Endpoint) -> None:
    thought = ours(thinking, stream=True)
    assert thought["reasoning"]
    assert "):" not in thought["reasoning"] + thought["text"]
    assert not ours(thinking, stream=True, options=WITHOUT_THINKING)["reasoning"]


def test_thinking_and_text_come_in_chunks_of_their_own_kind(thinking: Endpoint) -> None:
    job_input = {"messages": MESSAGES, "answerType": "stream", "options": OPTIONS}
    chunks = thinking.runsync(job_input)["output"]
    kinds = ["reasoning" in chunk for chunk in chunks if chunk["text"] or "reasoning" in chunk]
    assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize("stream", [False, True], ids=["normal", "stream"])
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}}],
    ids=["required", "named"],
)
def test_a_call_of_a_tool(thinking: Endpoint, stream: bool, choice: Any) -> None:
    options = WITHOUT_THINKING | {"max_tokens": 300, "temperature": 1, "seed": 3}
    asked = {"tools": TOOLS[:1], "tool_choice": choice}
    answer = ours(thinking, stream=stream, options=options, **asked)
    theirs = openai(thinking, stream=stream, **options, **asked)
    assert answer == theirs
    assert answer["calls"], answer
    assert answer["calls"][0]["name"] == "weather"
    assert json.loads(answer["calls"][0]["arguments"])["place"] in {"Paris", "Rome"}


def test_tools_that_are_not_called_leave_the_text(thinking: Endpoint) -> None:
    answer = ours(thinking, stream=True, options=WITHOUT_THINKING, tools=TOOLS)
    assert answer == openai(thinking, tools=TOOLS, **WITHOUT_THINKING)
    assert answer["text"]
    assert answer["calls"] == []


def test_two_answers_think_each_for_itself(thinking: Endpoint) -> None:
    options = OPTIONS | {"n": 2, "temperature": 0.1}
    job_input = {"messages": MESSAGES, "answerType": "stream", "options": options}
    chunks = thinking.runsync(job_input)["output"]
    for index in range(2):
        parts = [chunk for chunk in chunks if chunk["index"] == index]
        assert any("reasoning" in part for part in parts)
    assert [chunk for chunk in chunks if "usage" in chunk] == [chunks[-1]]


def test_a_model_that_is_not_served_is_refused(thinking: Endpoint) -> None:
    said = thinking.error({"messages": MESSAGES, "model": "gpt-4"})
    assert said.startswith('model: "gpt-4" is not served; there is ')


def test_what_vllm_does_not_take_of_messages_is_a_sentence(thinking: Endpoint) -> None:
    turn = {"role": "user", "content": [{"type": "image_url"}]}
    said = thinking.error({"messages": [turn]})
    assert said.startswith("messages")
    assert len(said) < 300
