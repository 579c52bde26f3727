"""OpenAI's routes and worker-vllm's shapes as jobs of the queue."""

import json
from typing import Any

import pytest

from tests.support import MODEL, Endpoint

pytestmark = pytest.mark.engine

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 24}
COMPLETION = {"prompt": "import os\n\ndef ", "temperature": 0, "max_tokens": 24}


def call(route: str, body: Any = None) -> dict[str, Any]:
    return {"openai_route": route, "openai_input": body}


def events(text: str) -> list[Any]:
    """The data of SSE text; the last is "[DONE]"."""
    assert text.endswith("\n\n")
    data = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


def answer(local: Endpoint, job_input: dict[str, Any]) -> Any:
    status = local.runsync(job_input)
    assert status["status"] == "COMPLETED", status
    [output] = status["output"]
    return output


def streamed(local: Endpoint, job_input: dict[str, Any]) -> list[str]:
    return list(local.stream(local.run(job_input)))


def test_the_list_of_models(local: Endpoint) -> None:
    models = answer(local, call("/v1/models"))
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert answer(local, call(f"/v1/models/{MODEL}"))["id"] == MODEL


def test_chat_normal_and_streamed_are_the_same_text(local: Endpoint) -> None:
    whole = answer(local, call("/v1/chat/completions", CHAT))
    assert whole["object"] == "chat.completion"
    assert whole["model"] == MODEL
    parts = streamed(local, call("/v1/chat/completions", CHAT | {"stream": True}))
    *chunks, done = events("".join(parts))
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    for part in parts:
        assert events(part), "a part holds whole events"


def test_our_own_shape_gives_the_same_text(local: Endpoint) -> None:
    whole = answer(local, call("/v1/completions", COMPLETION))
    options = {"temperature": 0, "max_tokens": 24}
    ours = local.text({"prompt": COMPLETION["prompt"], "options": options})
    assert ours == whole["choices"][0]["text"]
    chat = answer(local, call("/v1/chat/completions", CHAT))
    ours = local.text({"messages": CHAT["messages"], "options": options})
    assert ours == chat["choices"][0]["message"]["content"]


def test_structured_output_and_tools(local: Endpoint) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": "yes"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    options = {"response_format": wanted, "max_tokens": 100}
    whole = answer(local, call("/v1/chat/completions", CHAT | options))
    assert json.loads(whole["choices"][0]["message"]["content"]) == {"ok": "yes"}

    function = {"name": "add", "parameters": schema}
    tools = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "max_tokens": 100,
    }
    whole = answer(local, call("/v1/chat/completions", CHAT | tools))
    [tool_call] = whole["choices"][0]["message"]["tool_calls"]
    assert tool_call["type"] == "function"
    assert tool_call["function"]["name"] == "add"
    assert tool_call["function"]["arguments"]


@pytest.mark.parametrize(
    ("job_input", "code", "words"),
    [
        (call("/v1/chat/completions", {"messages": []}), 400, "conversation"),
        (call("/v1/completions", COMPLETION | {"temperature": -1}), 400, "temperature"),
        (call("/v1/completions", COMPLETION | {"model": "nope"}), 404, "nope"),
        (call("/v1/completions", COMPLETION | {"max_tokens": 10**6}), 400, "max_tokens"),
        (call("/v1/embeddings", {"input": "x"}), 404, None),
        (call("/v1/models/nope"), 404, "nope is not served"),
        (call("/metrics"), 404, "not served"),
        (call("/sleep", {"level": 1}), 404, "not served"),
        (call("/v1/load_lora_adapter", {"lora_name": "x"}), 404, "not served"),
        (call("/docs"), 404, "not served"),
        (call("/v1/responses", {"input": "x"}), 404, "not served"),
        (call("/v1/chat/completions/../../../metrics"), 404, "not served"),
        (call("/v1/completions"), 405, "takes POST"),
        ({"route": "/v1/models", "method": "DELETE"}, 405, "takes GET"),
    ],
    ids=range(14),
)
def test_errors_keep_openais_body_and_status(
    local: Endpoint, job_input: dict[str, Any], code: int, words: str | None
) -> None:
    error = json.loads(local.error(job_input))
    assert error["code"] == code
    assert set(error) >= {"message", "type", "param", "code"}
    if words:
        assert words in error["message"]


def test_a_stream_that_is_refused_is_a_failed_job(local: Endpoint) -> None:
    error = json.loads(
        local.error(call("/v1/completions", {"prompt": "x", "stream": True, "n": 0}))
    )
    assert error["code"] == 400


@pytest.mark.parametrize(
    "job_input",
    [
        {"prompt": COMPLETION["prompt"], "sampling_params": {"temperature": 0, "max_tokens": 24}},
        {"route": "/v1/completions", "method": "POST", "body": COMPLETION},
        {"route": "/v1/completions", "body": COMPLETION},
        {"openai_route": "/v1/completions", "openai_input": COMPLETION | {"stream": False}},
    ],
    ids=["prompt", "method", "body", "openai"],
)
def test_worker_vllms_shapes(local: Endpoint, job_input: dict[str, Any]) -> None:
    whole = answer(local, call("/v1/completions", COMPLETION))
    assert answer(local, job_input)["choices"][0]["text"] == whole["choices"][0]["text"]


def test_worker_vllms_streams(local: Endpoint) -> None:
    params = {"temperature": 0, "max_tokens": 24}
    job_input = {"messages": CHAT["messages"], "sampling_params": params, "stream": True}
    *chunks, done = events("".join(streamed(local, job_input)))
    assert done == "[DONE]"
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert answer(local, {"route": "/v1/models"})["object"] == "list"


def test_cancelling_a_streamed_chat_frees_the_engine(local: Endpoint) -> None:
    endless = CHAT | {"stream": True, "max_tokens": 1900, "ignore_eos": True}
    job = local.run(call("/v1/chat/completions", endless))
    next(local.stream(job))
    local.http.post(f"/cancel/{job}")
    assert local.finished(job)["status"] == "CANCELLED"
    assert answer(local, call("/v1/completions", COMPLETION))["choices"]
