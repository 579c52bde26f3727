"""vLLM's AsyncLLM with nothing around it: the limit that a worker can reach.

Reads runs as JSON lines `{"prompts": […]}` from standard input and answers each with one JSON
line, as benchmarks/endpoint.py does for a worker. Settings are the variables MODEL and
ENGINE_ARGS (JSON), and TOKENS, the tokens of every answer.
"""

import asyncio
import gc
import json
import os
import sys
import time
import uuid
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM


async def one(llm: AsyncLLM, prompt: str, begin: float) -> dict[str, Any]:
    """Generate one answer and time it."""
    params = SamplingParams(
        max_tokens=int(os.environ["TOKENS"]),
        ignore_eos=True,
        temperature=0,
        output_kind=RequestOutputKind.DELTA,
    )
    tokens = llm.tokenizer.encode(prompt)
    arrivals, texts = [], []
    async for output in llm.generate({"prompt_token_ids": tokens}, params, uuid.uuid4().hex):
        if text := output.outputs[0].text:
            arrivals.append(time.monotonic() - begin)
            texts.append(text)
    text = "".join(texts)
    return {
        "first": arrivals[0],
        "last": arrivals[-1],
        "end": time.monotonic() - begin,
        "chunks": len(texts),
        "bytes": len(text.encode()),
        "text": text,
        "finish_reason": output.outputs[0].finish_reason,
        "error": "",
    }


async def main() -> None:
    """Load the engine, say so, then answer run after run until standard input ends."""
    args = AsyncEngineArgs(
        model=os.environ["MODEL"], disable_log_stats=True, **json.loads(os.environ["ENGINE_ARGS"])
    )
    llm = AsyncLLM.from_engine_args(args)
    await one(llm, "Hello", time.monotonic())
    gc.collect()
    gc.freeze()  # as the worker does: a collection would hold up a run for half a second
    print("ready", file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        begin = time.monotonic()
        prompts = json.loads(line)["prompts"]
        results = await asyncio.gather(*(one(llm, prompt, begin) for prompt in prompts))
        print(json.dumps(results), file=answers, flush=True)
    llm.shutdown(timeout=0.5)


if __name__ == "__main__":
    # What the engine's processes print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(main())
