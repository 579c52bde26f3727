"""What a job may ask: the input shapes, validated, as one Request."""

import difflib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from worker.errors import BadRequest

DEFAULT_MAX_TOKENS = 512
"""Tokens of an answer when `max_tokens` is not given, or fewer if the context ends before."""

MAX_DEPTH = 64
"""Levels of nesting in a job's input; a JSON schema of the engine may have as many."""

Text = Annotated[str, StringConstraints(min_length=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class JsonSchema(_Strict):
    """OpenAI's `json_schema` object; only `schema` reaches the engine."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Options(_Strict):
    """Sampling parameters by their OpenAI and vLLM names. None: the model's own default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Int64 | None = None
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    bad_words: Annotated[list[Text], Field(max_length=256)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    response_format: ResponseFormat | None = None


class Message(BaseModel):
    """One turn of a chat; further keys go to the model's chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


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


class _Input(_Strict):
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answerType: Literal["normal", "stream"] = "normal"  # noqa: N815 - the contract's name
    options: Annotated[Options, AfterValidator(_consistent)] = Options()


@dataclass(frozen=True, slots=True)
class Request:
    """One validated request: a prompt or the messages of a chat, never both."""

    prompt: str | None
    messages: list[dict[str, Any]] | None
    stream: bool
    options: Options

    @property
    def max_tokens(self) -> int | None:
        """The client's own limit, under either of its names."""
        return self.options.max_tokens or self.options.max_new_tokens


@dataclass(frozen=True, slots=True)
class RouteCall:
    """A call to one of the engine's own HTTP routes; `body` is None where there is none."""

    route: str
    method: str
    body: dict[str, Any] | None


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
        raise BadRequest(_sentence(error)) from None
    if checked.prompt is None and checked.messages is None:
        field = "prompt" if "prompt" in job_input else "messages"
        raise BadRequest(f"{field}: must not be null")
    messages = job_input.get("messages")
    return Request(checked.prompt, messages, checked.answerType == "stream", checked.options)


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


def describe(value: object) -> str:
    """A short, safe picture of a value for an error message; never more than 80 characters."""
    match value:
        case None:
            return "null"
        case int() if value.bit_length() > 128:
            text = f"a number of {value.bit_length()} bits"
        case bool() | int() | float():
            text = json.dumps(value)
        case str():
            text = json.dumps(value[:60]) + (f"… ({len(value)} characters)" if value[60:] else "")
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {len(value)} keys"
        case _:
            return f"a {type(value).__name__}"
    return text


def _sentence(error: ValidationError) -> str:
    """The first problem, with what each branch of a union would have allowed."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    path = _path(problem)
    field = _short(
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    )
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field; {_nearest(path)}"
    branches = [other for other in problems if _path(other) == path]
    allowed = " or ".join(dict.fromkeys(map(_allowed, branches)))
    if problem["type"] == "missing":
        return f"{field}: missing; it must be given"
    if problem["type"] == "value_error":
        return f"{field}: {problem['ctx']['error']}"
    return f"{field}: {describe(problem['input'])} is not allowed; it must be {allowed}"


def _path(problem: Any) -> list[int | str]:
    """Where the problem is, without the branches of unions that pydantic names in between."""
    *parents, last = problem["loc"]
    path = [part for part in parents if not _is_branch(part)]
    return path if _is_branch(last) and problem["type"] != "extra_forbidden" else [*path, last]


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (
        part in {"str", "int", "float"} or any(mark in part for mark in "[(-")
    )


def _allowed(problem: Any) -> str:
    match problem["type"]:
        case "too_short":
            return f"at least {problem['ctx']['min_length']} of them"
        case "too_long":
            return f"at most {problem['ctx']['max_length']} of them"
        case kind if kind in KINDS:
            return KINDS[kind]
    message = str(problem["msg"])
    return message.removeprefix("Input should be ").removeprefix("String should have ")


KINDS = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}
"""pydantic's names of what a field may hold → ours."""


def _nearest(path: list[int | str]) -> str:
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
            raise BadRequest(f"{_short(path)}: nested too deep; at most {MAX_DEPTH} levels")
        if isinstance(value, str) and not _is_unicode(value):
            raise BadRequest(
                f"{_short(path)}: holds half of a surrogate pair; it must be valid Unicode"
            )
        if isinstance(value, dict):
            if not all(map(_is_unicode, value)):
                raise BadRequest(f"{_short(path)}: a key of it must be valid Unicode")
            stack.extend((f"{path}.{key}", item, depth + 1) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend((f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:40]}…{path[-30:]}"
