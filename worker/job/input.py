"""The shapes of a job's input, validated, as one Request or a call to a route."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from worker.errors import BadRequest
from worker.job.problems import describe, sentence, shortened
from worker.job.types import Options, Request, RouteCall, Strict, Text

MAX_DEPTH = 64
"""Levels of nesting in a job's input; a JSON schema of the engine may have as many."""


class Message(BaseModel):
    """One turn of a chat; further keys go to the model's chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class FunctionName(BaseModel):
    """Further keys, such as `parameters`, go to the model's chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: Text


class Tool(Strict):
    """A function that the model may call, or its name as a tool_choice."""

    type: Literal["function"]
    function: FunctionName


def _consistent(options: Options) -> Options:
    if options.max_tokens and options.max_new_tokens:
        raise ValueError("give max_tokens or max_new_tokens, not both")
    limit = options.max_tokens or options.max_new_tokens
    if limit and options.min_tokens and options.min_tokens > limit:
        raise ValueError(f"min_tokens {options.min_tokens} is more than max_tokens {limit}")
    wanted = options.response_format
    if wanted and wanted.type == "json_schema" and wanted.json_schema is None:
        raise ValueError("response_format of type json_schema needs json_schema")
    return options


class _Input(Strict):
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answerType: Literal["normal", "stream"] = "normal"  # noqa: N815 - the contract's name
    options: Annotated[Options, AfterValidator(_consistent)] = Options()
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | Tool | None = None
    model: Text | None = None


def parse(job_input: object) -> Request | RouteCall:
    """Validate a job's input.

    Raises:
        BadRequest: one sentence that names the field, the value and what is allowed.
    """
    if not isinstance(job_input, dict):
        raise BadRequest(f"input: must be an object, not {describe(job_input)}")
    _check_text(job_input)
    if ROUTE_KEYS & job_input.keys():
        return _route_call(job_input)
    if ("prompt" in job_input) == ("messages" in job_input):
        given = "both were given" if "prompt" in job_input else "neither was given"
        raise BadRequest(f"input: must hold either prompt or messages, but {given}")
    try:
        checked = _Input.model_validate(job_input)
    except ValidationError as error:
        raise BadRequest(sentence(error, _hint)) from None
    if checked.prompt is None and checked.messages is None:
        field = "prompt" if "prompt" in job_input else "messages"
        raise BadRequest(f"{field}: must not be null")
    _check_chat(checked)
    return Request(
        checked.prompt,
        job_input.get("messages"),
        checked.answerType == "stream",
        checked.options,
        job_input.get("tools"),
        job_input.get("tool_choice"),
        checked.model,
    )


def _check_chat(checked: _Input) -> None:
    """What belongs to messages stands beside them, and a tool that is named is there."""
    of_chats = {
        "tools": checked.tools,
        "tool_choice": checked.tool_choice,
        "options.chat_template_kwargs": checked.options.chat_template_kwargs,
    }
    for name, value in of_chats.items():
        if value is not None and checked.messages is None:
            raise BadRequest(f"{name}: belongs to messages; a prompt has no chat template")
    choice = checked.tool_choice
    if choice not in {None, "none"} and checked.tools is None:
        raise BadRequest("tool_choice: needs tools, but none were given")
    names = [tool.function.name for tool in checked.tools or []]
    if isinstance(choice, Tool) and choice.function.name not in names:
        name = describe(choice.function.name)
        raise BadRequest(f"tool_choice: {name} is none of the tools; they are {', '.join(names)}")


ROUTE_KEYS = {"openai_route", "openai_input", "route", "sampling_params", "stream"}
"""What only Runpod's OpenAI face and worker-vllm's clients send."""


def _route_call(job_input: dict[str, Any]) -> RouteCall:
    """worker-vllm's shapes, in the order in which that worker looks for them."""
    if "openai_route" in job_input or "openai_input" in job_input:
        body = _object_or_none(job_input, "openai_input")
        route = _text(job_input, "openai_route", "/v1/chat/completions")
        return RouteCall(route, "GET" if body is None else "POST", body)
    if "route" in job_input:
        body = _object_or_none(job_input, "body")
        method = _text(job_input, "method", "POST" if body else "GET").upper()
        return RouteCall(_text(job_input, "route", ""), method, body)
    if ours := {"answerType", "options"} & job_input.keys():
        theirs = ROUTE_KEYS & job_input.keys()
        raise BadRequest(f"input: {min(ours)} and {min(theirs)} are of two shapes; use one of them")
    if "prompt" not in job_input and "messages" not in job_input:
        raise BadRequest("input: must hold either prompt or messages, but neither was given")
    body = dict(_object_or_none(job_input, "sampling_params") or {})
    stream = job_input.get("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest(f"stream: {describe(stream)} is not allowed; it must be true or false")
    body["stream"] = stream
    if job_input.get("messages") is not None:
        return RouteCall("/v1/chat/completions", "POST", body | {"messages": job_input["messages"]})
    return RouteCall("/v1/completions", "POST", body | {"prompt": job_input.get("prompt")})


def _object_or_none(job_input: dict[str, Any], field: str) -> dict[str, Any] | None:
    value = job_input.get(field)
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"{field}: {describe(value)} is not allowed; it must be an object")
    return value


def _text(job_input: dict[str, Any], field: str, default: str) -> str:
    value = job_input.get(field) or default
    if not isinstance(value, str):
        raise BadRequest(f"{field}: {describe(value)} is not allowed; it must be a text")
    return value


def _hint(path: list[int | str]) -> str:
    """What to write instead of an unknown field."""
    fields = Options.model_fields if path[0] == "options" else _Input.model_fields
    name = str(path[-1])
    if name in Options.model_fields and path[0] != "options":
        return f"it belongs in options, as options.{name}"
    if close := difflib.get_close_matches(name, fields, n=1):
        return f"did you mean {close[0]}?"
    return f"allowed are {', '.join(fields)}"


def _check_text(job_input: dict[str, Any]) -> None:
    """Refuse what is no Unicode text or too deep; iterative, so that depth does no harm."""
    stack: list[tuple[str, object, int]] = [("input", job_input, 0)]
    while stack:
        path, value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise BadRequest(f"{shortened(path)}: nested too deep; at most {MAX_DEPTH} levels")
        if isinstance(value, str) and not _is_unicode(value):
            raise BadRequest(
                f"{shortened(path)}: holds half of a surrogate pair; it must be valid Unicode"
            )
        if isinstance(value, dict):
            if not all(map(_is_unicode, value)):
                raise BadRequest(f"{shortened(path)}: a key of it must be valid Unicode")
            stack.extend((f"{path}.{key}", item, depth + 1) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend((f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
