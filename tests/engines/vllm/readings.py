"""What vLLM's own parsers read in what models write: as a whole, and as it streams.

`python -m tests.engines.vllm.readings` reads tasks from standard input and prints as JSON what each
comes to, after the names that vLLM knows and the tokens that each parser cannot do without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

CHUNKS = (1, 7, 10_000)
"""Tokens of a delta."""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


def tokenizer_of(tokens: list[str]) -> PreTrainedTokenizerFast:
    """A token for each byte, and these."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    bare = Tokenizer(BPE(vocabulary, []))
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = ByteLevelDecoder()
    bare.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def deltas(tokenizer: Any, ids: list[int], size: int) -> Iterator[tuple[str, list[int]]]:
    """Text and tokens as they would stream; a character comes when it is whole."""
    sent, waiting = "", list[int]()
    for end in range(size, len(ids) + size, size):
        waiting += ids[end - size : end]
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("�"):
            continue
        yield text[len(sent) :], waiting
        sent, waiting = text, []


class Reader:
    """A family's parsers, as vLLM's server puts them together."""

    def __init__(self, task: dict[str, Any]) -> None:
        from vllm.parser import ParserManager

        self.tokenizer = tokenizer_of(task["tokens"])
        self.tokenizer.chat_template = task["template"]
        self.parser_class = ParserManager.get_parser(
            tool_parser_name=task["tool_call_parser"],
            reasoning_parser_name=task["reasoning_parser"],
            enable_auto_tools=bool(task["tool_call_parser"]),
            tokenizer=self.tokenizer,
        )

    def request(self, text: dict[str, Any]) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return ChatCompletionRequest(
            messages=[{"role": "user", "content": "Hello"}],
            tools=[TOOL],
            tool_choice="auto",
            chat_template_kwargs=text.get("options", {}),
        )

    def parser(self, text: dict[str, Any]) -> Any:
        assert self.parser_class
        options = text.get("options", {})
        tools = self.request(text).tools
        return self.parser_class(self.tokenizer, tools, chat_template_kwargs=options)

    def prompt(self, text: dict[str, Any]) -> list[int]:
        chat = [{"role": "user", "content": "Hello"}]
        rendered = self.tokenizer.apply_chat_template(
            chat,
            tools=[TOOL],
            add_generation_prompt=True,
            tokenize=False,
            **text.get("options", {}),
        )
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def whole(self, text: dict[str, Any]) -> dict[str, Any]:
        parser = self.parser(text)
        parser.set_prompt_token_ids(self.prompt(text))
        ids = self.tokenizer.encode(text["text"], add_special_tokens=False)
        reasoning, content, calls = parser.parse(
            text["text"], self.request(text), enable_auto_tools=True, model_output_token_ids=ids
        )
        return {
            "reasoning": (reasoning or "").strip(),
            "content": (content or "").strip(),
            "calls": [[call.name, json.loads(call.arguments)] for call in calls or []],
        }

    def streamed(self, text: dict[str, Any], size: int) -> dict[str, Any]:
        parser, request, prompt = self.parser(text), self.request(text), self.prompt(text)
        ids = self.tokenizer.encode(text["text"], add_special_tokens=False)
        pieces = list(deltas(self.tokenizer, ids, size))
        reasoning, content, names, arguments = "", "", dict[int, str](), dict[int, str]()
        for number, (piece, tokens) in enumerate(pieces, 1):
            delta = parser.parse_delta(
                piece, tokens, request, prompt, finished=number == len(pieces)
            )
            if not delta:
                continue
            reasoning += delta.reasoning or ""
            content += delta.content or ""
            for call in delta.tool_calls or []:
                names[call.index] = names.get(call.index, "") + (call.function.name or "")
                arguments.setdefault(call.index, "")
                arguments[call.index] += call.function.arguments or ""
        return {
            "reasoning": reasoning.strip(),
            "content": content.strip(),
            "calls": [[names[index], json.loads(arguments[index])] for index in sorted(names)],
        }


def readings(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each text of a family, what it comes to in each way; an error as `error`."""
    reader = Reader(task)
    found = []
    for text in task["texts"]:
        ways = {"whole": lambda: reader.whole(text)}  # noqa: B023 - called at once
        for size in CHUNKS:
            ways[f"by {size}"] = lambda size=size: reader.streamed(text, size)  # noqa: B023
        read: dict[str, Any] = {}
        for way, act in ways.items():
            try:
                read[way] = act()
            except Exception as error:  # noqa: BLE001 - the test shows it
                read[way] = {"error": repr(error)}
        found.append(read)
    return found


def needs(manager: Any, name: str, option: str, tokens: list[str]) -> bool:
    """Whether vLLM makes this parser with these tokens."""
    from vllm.parser import ParserManager

    options = {option: name, "enable_auto_tools": True}
    try:
        ParserManager.get_parser(tokenizer=tokenizer_of(tokens), **options)
    except TypeError:
        return False
    return True


def main() -> None:
    from vllm.parser import ParserManager
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    tasks = json.load(sys.stdin)
    print("\n" + json.dumps({
        "tool_call_parser": list(ToolParserManager.list_registered()),
        "reasoning_parser": list(ReasoningParserManager.list_registered()),
        "read": {task["family"]: readings(task) for task in tasks},
    }))


if __name__ == "__main__":
    main()
