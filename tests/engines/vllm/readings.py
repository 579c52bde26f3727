"""What Tripod chooses for a model's folder, and what vLLM's own parsers then read in its text.

`python -m tests.engines.vllm.readings` reads tasks from standard input and prints as JSON what each
comes to, beside the names that vLLM knows and the tokens that each parser cannot do without.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

CHUNKS = (1, 7, 10_000)
"""Tokens of a delta."""

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]

TOOL: dict[str, Any] = {
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
    """The parsers that were chosen, as vLLM's server puts them together."""

    def __init__(self, task: dict[str, Any], tools: str | None, reasoning: str | None) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        self.tokenizer = tokenizer_of(task["tokens"])
        self.template = task["template"]
        self.parser_class: Any = ParserManager.get_parser(
            tool_parser_name=tools,
            reasoning_parser_name=reasoning,
            enable_auto_tools=bool(tools),
            tokenizer=self.tokenizer,
        )
        self.request = ChatCompletionRequest(messages=CHAT, tools=[TOOL], tool_choice="auto")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, options: dict[str, Any]) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(
            CHAT,
            tools=[TOOL],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
            **options,
        )
        return self.ids(str(rendered))

    def whole(self, text: str, options: dict[str, Any]) -> dict[str, Any]:
        parser = self.parser_class(self.tokenizer, self.request.tools, chat_template_kwargs=options)
        parser.set_prompt_token_ids(self.prompt(options))
        reasoning, content, calls = parser.parse(
            text,
            self.request,
            enable_auto_tools=True,
            model_output_token_ids=self.ids(text),
        )
        return {
            "reasoning": (reasoning or "").strip(),
            "content": (content or "").strip(),
            "calls": [[call.name, json.loads(call.arguments)] for call in calls or []],
        }

    def streamed(self, text: str, options: dict[str, Any], size: int) -> dict[str, Any]:
        parser = self.parser_class(self.tokenizer, self.request.tools, chat_template_kwargs=options)
        prompt = self.prompt(options)
        pieces = list(deltas(self.tokenizer, self.ids(text), size))
        reasoning, content, calls = "", "", dict[int, list[str]]()
        for number, (piece, tokens) in enumerate(pieces, 1):
            finished = number == len(pieces)
            delta = parser.parse_delta(piece, tokens, self.request, prompt, finished=finished)
            if not delta:
                continue
            reasoning += delta.reasoning or ""
            content += delta.content or ""
            for call in delta.tool_calls or []:
                name, arguments = calls.get(call.index, ("", ""))
                name += call.function.name or ""
                calls[call.index] = [name, arguments + (call.function.arguments or "")]
        return {
            "reasoning": reasoning.strip(),
            "content": content.strip(),
            "calls": [[name, json.loads(text)] for _, (name, text) in sorted(calls.items())],
        }

    def ways(self, text: str, options: dict[str, Any]) -> dict[str, Any]:
        acts = {"whole": partial(self.whole, text, options)}
        acts |= {f"by {size}": partial(self.streamed, text, options, size) for size in CHUNKS}
        return {way: result(act) for way, act in acts.items()}


def result(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - the test shows it
        return {"error": repr(error)}


def chosen(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """What `vllm serve` would be told beside ENGINE_ARGS for the model in a folder."""
    from worker.engines.vllm.arguments import parsed
    from worker.engines.vllm.families import choose_parsers
    from worker.settings import Settings

    settings = Settings(model="org/name", engine_args=given)
    args = parsed(settings)
    args.model = folder
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("worker.engines.vllm.families")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    choose_parsers(args, given)
    logger.removeHandler(handler)
    options = ("enable_auto_tool_choice", "tool_call_parser", "reasoning_parser")
    return {name: getattr(args, name) or None for name in options} | {"said": said.getvalue()}


def done(task: dict[str, Any]) -> dict[str, Any]:
    found = chosen(task["folder"], task.get("given", {}))
    names = found["tool_call_parser"], found["reasoning_parser"]
    if not task.get("texts"):
        return found
    reader = Reader(task, *names)
    read = [reader.ways(text["text"], text.get("options", {})) for text in task["texts"]]
    return found | {"read": read}


def can_be_made(option: str, name: str, tokens: list[str]) -> bool:
    """Whether vLLM makes this parser with a tokenizer that has these special tokens only."""
    from vllm.parser import ParserManager

    names = {{"tool_call_parser": "tool_parser_name"}.get(option, "reasoning_parser_name"): name}
    parser_class: Any = ParserManager.get_parser(**names, enable_auto_tools=True)
    thinking = {"thinking": True, "enable_thinking": True}
    made = result(lambda: parser_class(tokenizer_of(tokens), chat_template_kwargs=thinking))
    return not isinstance(made, dict)


def main() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    from worker.engines.vllm.families import table

    families, needed = table()
    found: dict[str, Any] = {
        "known": {
            "tool_call_parser": list(ToolParserManager.list_registered()),
            "reasoning_parser": list(ReasoningParserManager.list_registered()),
        },
        "done": {name: done(task) for name, task in json.load(sys.stdin).items()},
    }
    for option in found["known"]:
        for name in {getattr(family, option) for family in families} - {None}:
            tokens = needed[option].get(name, [])
            made = [can_be_made(option, name, some) for some in ([], tokens)]
            found[f"{option} {name}"] = made
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
