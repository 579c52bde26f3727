"""How long a prompt and its answer may be, what is a token id, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Iterable

from worker.errors import BadRequest
from worker.job.problems import describe
from worker.job.types import DEFAULT_MAX_TOKENS, Request


def field_of(request: Request) -> str:
    """The name of what a request asks about: `prompt` or `messages`."""
    return "prompt" if request.prompt is not None else "messages"


def too_long(request: Request, tokens: str, max_model_len: int) -> BadRequest:
    """The refusal of a prompt that leaves no room for an answer."""
    return BadRequest(
        f"{field_of(request)}: {tokens} tokens are not allowed; it must be at most "
        f"{max_model_len - 1}, one less than max_model_len"
    )


def answer_tokens(
    request: Request, prompt_tokens: int, max_model_len: int, default: int | None = None
) -> int:
    """The tokens of the answer at most; `default` is the model's own wish.

    Raises:
        BadRequest: the prompt, max_tokens or min_tokens exceeds the context.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise too_long(request, str(prompt_tokens), max_model_len)
    limits = {"max_tokens": request.max_tokens, "min_tokens": request.options.min_tokens}
    for name, tokens in limits.items():
        if tokens and tokens > room:
            raise BadRequest(
                f"options.{name}: {tokens} is not allowed; it must be at most {room}, what a "
                f"prompt of {prompt_tokens} tokens leaves of max_model_len {max_model_len}"
            )
    wanted = request.max_tokens or max(
        default or DEFAULT_MAX_TOKENS, request.options.min_tokens or 0
    )
    return min(wanted, room)


def token_bias(bias: dict[str, float]) -> dict[int, float]:
    """`logit_bias` by token id.

    Raises:
        BadRequest: a key is no token id.
    """
    if wrong := next((key for key in bias if not key.isdecimal()), None):
        raise BadRequest(f"options.logit_bias: {wrong!a} is not allowed; it must be a token id")
    return {int(key): value for key, value in bias.items()}


def not_served(model: str, served: Iterable[str]) -> BadRequest:
    """The refusal of a model that is not there."""
    return BadRequest(f"model: {describe(model)} is not served; there is {', '.join(served)}")
