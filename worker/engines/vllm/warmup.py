"""What a first request would wait for: it is made before the worker is ready, or never."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import httpx

from worker.errors import EngineStartError
from worker.job.routes import error_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

log = logging.getLogger(__name__)

KINDS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 1},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "top_k and top_p": {"temperature": 1, "top_k": 5, "top_p": 0.9},
    "min_p": {"temperature": 1, "min_p": 0.1},
    "seed and n": {"temperature": 1, "seed": 1, "n": 2},
    "logit_bias": {"logit_bias": {"1": 1}},
    "allowed_token_ids": {"allowed_token_ids": [1, 2]},
    "min_tokens": {"min_tokens": 1},
    "bad_words": {"bad_words": ["Hello"]},
}
"""What the sampler has kernels of its own for; asked for at once, so that they share steps."""

STRUCTURED: dict[str, Any] = {"structured_outputs": {"choice": ["yes", "no"]}}


def avoid_compiling(config: VllmConfig) -> None:
    """On a CPU, have vLLM compile no helper where it does not compile the model.

    It would at the first request that needs one, logprobs above all, and all others would wait
    for that; the uncompiled helpers compute the same. Its processes inherit the variable.
    """
    from vllm.config import CompilationMode

    if _is_cpu(config) and config.compilation_config.mode == CompilationMode.NONE:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


async def warm(client: httpx.AsyncClient, config: VllmConfig) -> None:
    """Generate a little, and where kernels are compiled at their first use, use them all.

    What the model refuses is told and is no fault.

    Args:
        client: calls vLLM's app.

    Raises:
        EngineStartError: the engine fails on the plainest request.
    """
    plain = _plain(config.model_config)
    refusal, is_failure = await _problem(client, plain)
    if is_failure:
        raise EngineStartError(f"vLLM is up but generates nothing: {refusal}")
    if refusal:
        log.info("no warm-up generation: %s", refusal)
        return
    if _is_cpu(config) and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return
    kinds = dict(KINDS)
    if config.lora_config:
        # vLLM 0.32 applies a batch's adapters to a prompt's tokens; on a CPU the engine dies of it.
        del kinds["prompt_logprobs"]
    # With `auto` the first request of all decides which backend the engine keeps: not ours.
    if config.structured_outputs_config.backend != "auto":
        kinds["structured_outputs"] = STRUCTURED
    problems = await asyncio.gather(*(_problem(client, plain | kind) for kind in kinds.values()))
    for kind, (problem, is_failure) in zip(kinds, problems, strict=True):
        if problem:
            level = logging.WARNING if is_failure else logging.INFO
            log.log(level, "no warm-up of %s: %s", kind, problem)


def _plain(model: ModelConfig) -> dict[str, Any]:
    prompt = [1, 2] if model.skip_tokenizer_init else "Hello"
    return {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}


def _is_cpu(config: VllmConfig) -> bool:
    return bool(config.device_config.device_type == "cpu")


async def _problem(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, bool]:
    """What is wrong, empty if nothing is, and whether that is the engine's fault."""
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        return str(error), True
    return error_of(answer)["message"] if answer.is_error else "", answer.is_server_error
