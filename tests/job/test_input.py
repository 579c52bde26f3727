"""The job's input, without an engine."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import BadRequest
from worker.job.input import MAX_DEPTH, Options, parse


def refusal(job_input: object) -> str:
    with pytest.raises(BadRequest) as caught:
        parse(job_input)
    return str(caught.value)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_prompt() -> None:
    request = parse({"prompt": "Hi"})
    assert (request.prompt, request.messages, request.stream) == ("Hi", None, False)


def test_messages_keep_the_keys_that_templates_know() -> None:
    messages = [{"role": "user", "content": "Hi", "name": "Ada"}]
    request = parse({"messages": messages, "answerType": "stream"})
    assert request.stream
    assert request.messages == messages


def test_options_by_their_openai_names_and_the_old_one() -> None:
    options = {"temperature": 0, "top_k": 5, "stop": ["a"], "seed": 1, "ignore_eos": True}
    assert parse({"prompt": "x", "options": options}).options == Options(**options)
    assert parse({"prompt": "x", "options": {"max_new_tokens": 7}}).max_tokens == 7


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def test_tools_keep_the_keys_that_templates_know() -> None:
    request = parse({**CHAT, "tools": [CLOCK], "tool_choice": "required", "model": "a"})
    assert (request.tools, request.tool_choice, request.model) == ([CLOCK], "required", "a")


BAD = [
    (None, "input: must be an object, not null"),
    ([1], "input: must be an object, not a list of 1"),
    ("text", 'input: must be an object, not "text"'),
    ({}, "input: must hold either prompt or messages, but neither was given"),
    ({"prompt": "a", "messages": []}, "either prompt or messages, but both were given"),
    ({"prompt": None}, "prompt: must not be null"),
    ({"prompt": ""}, 'prompt: "" is not allowed; it must be at least 1 character'),
    ({"prompt": 3}, "prompt: 3 is not allowed; it must be a text"),
    ({"prompt": ["a"]}, "prompt: a list of 1 is not allowed; it must be a text"),
    ({"prompt": "x", "answerType": "fast"}, 'answerType: "fast" is not allowed; it must be'),
    ({"prompt": "x", "promt": 1}, "promt: unknown field; did you mean prompt?"),
    ({"prompt": "x", "max_tokens": 1}, "belongs in options, as options.max_tokens"),
    ({"prompt": "x", "tools": [CLOCK]}, "tools: belongs to messages"),
    ({"prompt": "x", "tool_choice": "auto"}, "tool_choice: belongs to messages"),
    (
        {"prompt": "x", "options": {"chat_template_kwargs": {}}},
        "options.chat_template_kwargs: belongs to messages",
    ),
    ({**CHAT, "tools": []}, "tools: a list of 0 is not allowed; it must be at least 1"),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools[0].function: missing"),
    ({**CHAT, "tools": [{**CLOCK, "type": "x"}]}, 'tools[0].type: "x" is not allowed; it must be'),
    ({**CHAT, "tool_choice": "auto"}, "tool_choice: needs tools, but none were given"),
    ({**CHAT, "tools": [CLOCK], "tool_choice": "always"}, 'tool_choice: "always" is not allowed'),
    (
        {**CHAT, "tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "a"}}},
        'tool_choice: "a" is none of the tools; they are clock',
    ),
    ({"prompt": "x", "model": 3}, "model: 3 is not allowed; it must be a text"),
    ({"messages": []}, "messages: a list of 0 is not allowed; it must be at least 1"),
    ({"messages": ["x"]}, 'messages[0]: "x" is not allowed; it must be an object'),
    ({"messages": [{"content": "x"}]}, "messages[0].role: missing"),
    ({"messages": [{"role": "bot"}]}, 'messages[0].role: "bot" is not allowed'),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content: 1 is not allowed"),
    ({"prompt": "x", "options": []}, "options: a list of 0 is not allowed; it must be an object"),
    ({"prompt": "x", "options": {"temperature": 2.1}}, "less than or equal to 2"),
    ({"prompt": "x", "options": {"temperature": "1"}}, "options.temperature: "),
    ({"prompt": "x", "options": {"temperature": float("nan")}}, "a finite number"),
    ({"prompt": "x", "options": {"top_p": 0}}, "options.top_p: 0 is not allowed"),
    ({"prompt": "x", "options": {"n": True}}, "options.n: true is not allowed"),
    ({"prompt": "x", "options": {"max_tokens": 0}}, "greater than or equal to 1"),
    ({"prompt": "x", "options": {"seed": 2**64}}, "options.seed: 18446744073709551616"),
    ({"prompt": "x", "options": {"seed": 10**400}}, "a number of 1329 bits"),
    ({"prompt": "x", "options": {"temprature": 1}}, "did you mean temperature?"),
    ({"prompt": "x", "options": {"foo-bar": 1}}, "options.foo-bar: unknown field; allowed are"),
    ({"prompt": "x", "options": {"max_tokens": 1, "max_new_tokens": 1}}, "not both"),
    ({"prompt": "x", "options": {"max_tokens": 1, "min_tokens": 2}}, "more than max_tokens 1"),
    ({"prompt": "x", "options": {"response_format": {"type": "json_schema"}}}, "json_schema"),
    ({"prompt": "a\ud800"}, "input.prompt: holds half of a surrogate pair"),
    ({"prompt": "x", "\udfff": 1}, "input: a key of it must be valid Unicode"),
    ({"messages": [{"role": "user", "content": nested(500)}]}, "nested too deep; at most 64"),
    ({"openai_input": []}, "openai_input: a list of 0 is not allowed; it must be an object"),
    ({"route": 3}, "route: 3 is not allowed; it must be a text"),
    ({"prompt": "x", "stream": "yes"}, 'stream: "yes" is not allowed; it must be true or false'),
    ({"prompt": "x", "stream": True, "options": {}}, "options and stream are of two shapes"),
    ({"sampling_params": {}}, "either prompt or messages, but neither was given"),
]


@pytest.mark.parametrize(("job_input", "sentence"), BAD, ids=range(len(BAD)))
def test_a_refusal_names_field_value_and_what_is_allowed(job_input: object, sentence: str) -> None:
    assert sentence in refusal(job_input)


def test_a_refusal_is_short_however_large_the_input() -> None:
    assert len(refusal({"prompt": ["x" * 5_000_000]})) < 200
    assert len(refusal({"prompt": "x", "answerType": "y" * 5_000_000})) < 200
    assert len(refusal({"prompt": "x", "z" * 5_000_000: 1})) < 200
    assert len(refusal({"messages": [{"role": "user", "content": "a\ud800", "k" * 9999: 1}]})) < 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.sampled_from(["user", "stream", "normal"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
FIELDS = st.sampled_from(["prompt", "messages", "answerType", "options", "role", "content"])
OPTIONS = st.dictionaries(st.sampled_from(list(Options.model_fields)) | st.text(), JSON)


@given(
    st.dictionaries(FIELDS, JSON)
    | st.fixed_dictionaries({"prompt": st.text(min_size=1), "options": OPTIONS})
    | st.fixed_dictionaries(
        {"messages": st.lists(st.dictionaries(FIELDS | st.just("role"), JSON), max_size=3)}
    )
    | JSON
)
def test_whatever_comes_is_a_request_or_one_sentence(job_input: Any) -> None:
    try:
        request = parse(job_input)
    except BadRequest as error:
        sentence = str(error)
        assert 0 < len(sentence) < 700
        assert "\n" not in sentence
        json.dumps(sentence, ensure_ascii=False).encode("utf-8")
    else:
        assert (request.prompt is None) != (request.messages is None)


@given(st.integers(0, 200))
def test_depth_is_bounded(depth: int) -> None:
    messages = [{"role": "user", "content": "x", "extra": nested(depth)}]
    if 3 + depth > MAX_DEPTH:  # input.messages[0].extra is three levels down
        assert "nested too deep" in refusal({"messages": messages})
    else:
        assert parse({"messages": messages}).messages == messages
