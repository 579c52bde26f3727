"""vLLM's outputs → deltas: text, and where the model has a parser, thinking and calls of tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker.errors import EngineError
from worker.job.types import Delta, ToolCall, Usage

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import Parser


async def answers(
    outputs: AsyncGenerator[RequestOutput, None], n: int, reader: Reader | None
) -> AsyncGenerator[Delta, None]:
    """The deltas of the `n` answers, as vLLM brings them.

    Args:
        reader: finds thinking and calls in them; None where all of it is text.

    Raises:
        EngineError: vLLM failed on this request.
    """
    tokens = 0
    unfinished = n
    async with aclosing(outputs):
        async for output in outputs:
            prompt = output.prompt_token_ids or []
            for part in output.outputs:
                if part.finish_reason == "error":
                    raise EngineError("the engine failed on this job")
                tokens += len(part.token_ids)
                unfinished -= part.finish_reason is not None
                delta = reader.read(part, prompt) if reader else _plain(part)
                if not unfinished:
                    delta = replace(delta, usage=Usage(len(prompt), tokens))
                if delta.text or delta.reasoning or delta.tool_calls or delta.finish_reason:
                    yield delta  # else it is half a character, or what may become a stop string


class Reader:
    """vLLM's parsers for the answers of one chat, read as its OpenAI route reads them.

    Args:
        parsers: one an answer.
        kwargs: what the chat template was given.
        is_auto: whether the model may call tools by itself.
    """

    def __init__(
        self,
        parsers: list[Parser],
        asked: ChatCompletionRequest,
        kwargs: dict[str, Any],
        *,
        is_auto: bool,
    ) -> None:
        self._parsers = parsers
        self._asked = asked
        self._kwargs = kwargs
        self._is_auto = is_auto
        self._callers: set[int] = set()

    def engine_hints(self, prompt: list[int]) -> dict[str, Any]:
        """What the engine must know for a structured output to begin after the thinking."""
        parser = self._parsers[0]
        thinks = parser.reasoning_parser is not None
        return {
            "reasoning_ended": self._asked.resolve_reasoning_ended(parser, prompt),
            "reasoning_parser_kwargs": {"chat_template_kwargs": self._kwargs} if thinks else None,
        }

    def read(self, part: CompletionOutput, prompt: list[int]) -> Delta:
        """What is new in a piece of a stream, or in a whole answer."""
        delta = self._piece(part, prompt) if self._asked.stream else self._whole(part)
        if delta.tool_calls:
            self._callers.add(part.index)
        is_named = not isinstance(self._asked.tool_choice, str | None)
        if part.finish_reason == "stop" and part.index in self._callers and not is_named:
            delta = replace(delta, finish_reason="tool_calls")
        return delta

    def _piece(self, part: CompletionOutput, prompt: list[int]) -> Delta:
        said = self._parsers[part.index].parse_delta(
            part.text,
            list(part.token_ids),
            self._asked,
            prompt,
            finished=part.finish_reason is not None,
        )
        if said is None:
            return Delta("", part.index, part.finish_reason)
        calls = tuple(call.model_dump(exclude_none=True) for call in said.tool_calls)
        return Delta(
            said.content or "",
            part.index,
            part.finish_reason,
            reasoning=said.reasoning or "",
            tool_calls=calls,
        )

    def _whole(self, part: CompletionOutput) -> Delta:
        reasoning, text, calls = self._parsers[part.index].parse(
            part.text, self._asked, self._is_auto, part.token_ids
        )
        return Delta(
            text or "",
            part.index,
            part.finish_reason,
            reasoning=reasoning or "",
            tool_calls=tuple(_call(index, call) for index, call in enumerate(calls or [])),
        )


def _plain(part: CompletionOutput) -> Delta:
    return Delta(part.text, part.index, part.finish_reason)


def _call(index: int, function: Any) -> ToolCall:
    from vllm.renderers.chat_utils import make_tool_call_id

    return {
        "index": index,
        "id": function.id or make_tool_call_id(),
        "type": "function",
        "function": {"name": function.name, "arguments": function.arguments},
    }
