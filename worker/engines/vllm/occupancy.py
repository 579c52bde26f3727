"""How many more requests vLLM would run at once, by what its scheduler says and what runs in it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import SchedulerStats

RESERVE = 0.1
"""The share of the KV cache that is left free, so that requests can be longer than expected."""

REMEMBERED = 64
"""Requests whose lengths tell how long the next ones will be."""

LONG = 0.9
"""The next one is taken to be as long as this share of them at most was."""


class Occupancy:
    """Reckons in tokens of KV cache.

    Args:
        llm: built with statistics, before it has served.
        counts_tokens: whether they are wanted in this process too, or only of the scheduler.
    """

    def __init__(self, llm: AsyncLLM, config: VllmConfig, *, counts_tokens: bool) -> None:
        if not counts_tokens:
            llm.log_stats = llm.output_processor.log_stats = False
            llm.logger_manager = None
        cache = config.cache_config
        self._max_model_len = config.model_config.max_model_len
        self._block = int(cache.block_size)
        self._sequences = int(config.scheduler_config.max_num_seqs)
        self._pools = config.model_config.runner_type == "pooling"
        self.tokens = int(cache.kv_cache_size_tokens or 0)
        # Without a KV cache, as an embedding model may be, nothing but the batch bounds them.
        held = int(cache.kv_cache_max_concurrency or 1) if self.tokens else self._sequences
        self.at_full_length = max(1, min(held, self._sequences))
        self._lengths: deque[int] = deque(maxlen=REMEMBERED)
        self._last: SchedulerStats | None = None
        self._processor = llm.output_processor
        self._processor.request_states = _Running(self._processor.request_states, self._lengths)
        self._heard = self._processor.update_scheduler_stats
        self._processor.update_scheduler_stats = self._hear

    def forget(self) -> None:
        """What has run so far was a warm-up, and tells nothing of the lengths to come."""
        self._lengths.clear()

    def room(self) -> int:
        """Requests that would neither wait nor drive others out, beside those that are there."""
        states = list(self._processor.request_states.values())
        bound: int = self._sequences - len(states)
        if self._last and self._last.num_waiting_reqs and states:
            return 0
        if not self.tokens or self._pools:
            return max(0, bound)
        if not states and not self._lengths:
            return self.at_full_length
        expected = self._expected(states)
        used = self.tokens * (self._last.kv_cache_usage if self._last and states else 0.0)
        for state in states:
            now = _length(state)
            # One that is longer than expected goes on for as long as those that come now.
            then = min(self._limit(state), expected if now < expected else now + expected)
            held = 0 if state.is_prefilling else self._in_blocks(now)
            used += max(0, self._in_blocks(then) - held)
        room = int((self.tokens * (1 - RESERVE) - used) // self._in_blocks(expected))
        return max(0 if states else 1, min(room, bound))

    def _expected(self, states: list[Any]) -> int:
        """Tokens of the next request's prompt and answer together."""
        if self._lengths:
            lengths = sorted(self._lengths)
            return max(1, lengths[int(LONG * (len(lengths) - 1))])
        return max(map(self._limit, states), default=self._max_model_len)

    def _in_blocks(self, tokens: int) -> int:
        """What so many tokens take of the cache, and the place of the next one."""
        return -(-(tokens + 1) // self._block) * self._block

    def _limit(self, state: Any) -> int:
        """Tokens that it may come to."""
        most = state.prompt_len + (state.max_tokens_param or self._max_model_len)
        return int(min(most, self._max_model_len))

    def _hear(self, stats: SchedulerStats | None) -> None:
        if stats is not None:
            self._last = stats
        self._heard(stats)


class _Running(dict[str, Any]):
    """vLLM's requests by their ids; remembers how long each was in the end."""

    def __init__(self, states: dict[str, Any], lengths: deque[int]) -> None:
        super().__init__(states)
        self._lengths = lengths

    def pop(self, key: str, *default: Any) -> Any:
        state = super().pop(key, *default)
        if state is not None:
            self._lengths.append(_length(state))
        return state


def _length(state: Any) -> int:
    answer = state.detokenizer.num_output_tokens() if state.detokenizer else 0
    return int(state.prompt_len + answer)
