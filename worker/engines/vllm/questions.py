"""A request → what vLLM's own OpenAI routes would make of it: with its options, rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from worker.engines.limits import token_bias
from worker.errors import BadRequest
from worker.job.problems import sentence
from worker.job.types import Request

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.inputs import EngineInput
    from vllm.renderers.online_renderer import OnlineRenderer


def question(request: Request) -> ChatCompletionRequest | CompletionRequest:
    """vLLM's own request, without a limit of tokens.

    Raises:
        BadRequest: an option or a message is nothing that vLLM takes.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    token_bias(request.options.logit_bias or {})
    given = request.options.model_dump(
        by_alias=True, exclude_none=True, exclude={"max_tokens", "max_new_tokens"}
    )
    given |= {"stream": request.stream, "max_tokens": None}
    try:
        if request.prompt is not None:
            return CompletionRequest(prompt=request.prompt, **given)
        return ChatCompletionRequest(messages=request.messages, **request.tool_fields, **given)
    except ValidationError as error:
        raise BadRequest(sentence(error, lambda _: "vLLM does not know it")) from None


async def rendered(
    asked: ChatCompletionRequest | CompletionRequest, renderer: OnlineRenderer
) -> EngineInput:
    """The prompt's tokens, by the tokenizer and chat template of the OpenAI routes.

    A chat's parser may change `asked`, so that its sampling is to be made afterwards.

    Raises:
        BadRequest: vLLM's sentence on what it does not take.
    """
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(asked, CompletionRequest):
        answer = await renderer.render_completion(asked)
    else:
        answer = await renderer.render_chat(asked)
    if isinstance(answer, ErrorResponse):
        raise BadRequest(f"messages, tools or options: {answer.error.message}")
    [prompt] = answer if isinstance(asked, CompletionRequest) else answer[1]
    return prompt
