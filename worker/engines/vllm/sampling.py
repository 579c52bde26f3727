"""A request's options → vLLM's SamplingParams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.engines.limits import answer_tokens, token_bias
from worker.job.types import Options, Request

if TYPE_CHECKING:
    from vllm import SamplingParams


def sampling(
    request: Request, prompt_tokens: int, max_model_len: int, defaults: dict[str, Any]
) -> SamplingParams:
    """What vLLM is to generate, as deltas.

    Args:
        defaults: the model's own, for options that the request leaves out.

    Raises:
        BadRequest: the prompt, max_tokens or min_tokens exceeds the context, or an option is
            nothing that vLLM takes.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    values = defaults | _named(request.options)
    values["max_tokens"] = answer_tokens(
        request, prompt_tokens, max_model_len, values.get("max_tokens")
    )
    return SamplingParams(**values, output_kind=RequestOutputKind.DELTA)


def _named(options: Options) -> dict[str, Any]:
    """The options that were given, as SamplingParams takes them."""
    from vllm.sampling_params import StructuredOutputsParams

    given = options.model_dump(
        exclude_none=True,
        exclude={"max_tokens", "max_new_tokens", "response_format", "logit_bias"},
    )
    if options.logit_bias is not None:
        given["logit_bias"] = token_bias(options.logit_bias)
    wanted = options.response_format
    if wanted and wanted.json_schema:
        given["structured_outputs"] = StructuredOutputsParams(json=wanted.json_schema.schema_)
    elif wanted and wanted.type == "json_object":
        given["structured_outputs"] = StructuredOutputsParams(json_object=True)
    return given
