"""A plugin for vLLM: the bundled model "thinks" until it closes a parenthesis before a colon."""

from typing import Any

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser


@ReasoningParserManager.register_module("thinks")
class Thinks(DeepSeekR1ReasoningParser):
    start_token = "<|assistant|>"
    end_token = "):"

    def __init__(self, *args: Any, chat_template_kwargs: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_on = (chat_template_kwargs or {}).get("enable_thinking", True)

    def extract_reasoning(self, model_output: str, request: Any) -> Any:
        if not self._is_on:
            return None, model_output
        return super().extract_reasoning(model_output, request)
