"""What a job asks and what an engine answers: the types that the rooms exchange."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

DEFAULT_MAX_TOKENS = 512
"""Tokens of an answer when `max_tokens` is not given, or fewer if the context ends before."""

Text = Annotated[str, StringConstraints(min_length=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
ToolCall = dict[str, Any]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """Takes JSON as it is: nothing is converted, nothing unknown is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _named(name: object) -> object:
    """OpenAI asks for a name."""
    return "answer" if name is None else name


class JsonSchema(Strict):
    """OpenAI's `json_schema` object; only `schema` reaches the engine."""

    name: Annotated[str, BeforeValidator(_named)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Options(Strict):
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
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One validated request: a prompt or the messages of a chat, never both.

    Args:
        tools: functions that the model may call, as OpenAI's chats have them.
        tool_choice: `auto`, `none`, `required`, or OpenAI's object that names one of them.
        model: a name that the engine serves beside its own, such as an adapter's.
    """

    prompt: str | None
    messages: list[dict[str, Any]] | None
    stream: bool
    options: Options
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    model: str | None = None

    @property
    def tool_fields(self) -> dict[str, Any]:
        """`tools` and `tool_choice` as OpenAI's route takes them; neither where there are none."""
        if not self.tools:
            return {}
        return {"tools": self.tools, "tool_choice": self.tool_choice or "auto"}

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


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of all its answers."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What has been generated since the last delta of the same answer.

    Args:
        text: whole characters only; may be empty when only `finish_reason` is new.
        index: which answer it belongs to, 0 ≤ index < options.n.
        finish_reason: `stop`, `length` or `tool_calls` on the last delta of an answer, else None.
        usage: on the very last delta of a request, else None.
        reasoning: what the model thought before its answer; whole characters only.
        tool_calls: pieces of calls as OpenAI streams them, `{"index", "id", "type", "function":
            {"name", "arguments"}}`; of one call the arguments follow each other.
    """

    text: str
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
