"""Which of vLLM's parsers read a model's tool calls and thinking: families.toml says it."""

from __future__ import annotations

import json
import logging
import re
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from worker.engines.options import underscored

log = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("families.toml")

TOOL_NAME = "a_tool_of_the_probe"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "A tool",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city"}},
            "required": ["city"],
        },
    },
}
"""Shown to a template that is asked whether it shows tools to the model."""

OPEN = re.compile(r"<[\w:]*think>\s*$")
CLOSED = re.compile(r"</[\w:]*think>\s*$")


@dataclass(frozen=True, config={"extra": "forbid"})
class Family:
    """One entry of the table, which explains the fields."""

    name: str
    about: str
    model_types: tuple[str, ...]
    file: str = ""
    template: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    thinking: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    def fits(self, folder: Path, model_types: set[str], template: str) -> bool:
        return (
            not model_types.isdisjoint(self.model_types)
            and (not self.file or (folder / self.file).is_file())
            and all(mark in template for mark in self.template)
            and not any(mark in template for mark in self.without)
            and (not self.thinking or thinking(template) in self.thinking)
        )


@cache
def table() -> tuple[tuple[Family, ...], Mapping[str, Mapping[str, list[str]]]]:
    """The families in their order, and by option and parser the tokens that it needs."""
    read = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    families = TypeAdapter(tuple[Family, ...]).validate_python(read["family"])
    return families, read["tokens"]


def choose_parsers(args: Namespace, given: Mapping[str, Any]) -> None:
    """Set the parsers of a known family in `args`, where ENGINE_ARGS does not speak of them.

    Args:
        args: of `vllm serve`, as its parser took them, for a model that generates.
        given: ENGINE_ARGS. `tool_call_parser` or `enable_auto_tool_choice` there decides on tools,
            `reasoning_parser` on thinking; null or false switches it off.
    """
    from vllm.renderers.chat_utils import load_chat_template

    folder = Path(args.tokenizer or args.model)
    uses_tekken = args.tokenizer_mode in {"auto", "mistral"}
    family = family_of(folder, load_chat_template(args.chat_template), uses_tekken)
    if not family:
        return
    names = set(map(underscored, given))
    said = []
    if family.tool_call_parser and not names & {"tool_call_parser", "enable_auto_tool_choice"}:
        args.enable_auto_tool_choice = True
        args.tool_call_parser = family.tool_call_parser
        said.append(f"tool_call_parser={family.tool_call_parser}")
    in_config = args.structured_outputs_config.reasoning_parser
    if family.reasoning_parser and "reasoning_parser" not in names and not in_config:
        args.reasoning_parser = family.reasoning_parser
        said.append(f"reasoning_parser={family.reasoning_parser}")
    if said:
        log.info(
            "%s, as for the family %s; ENGINE_ARGS may say otherwise", ", ".join(said), family.name
        )


def family_of(
    folder: Path, given_template: str | None = None, uses_tekken: bool = True
) -> Family | None:
    """The first family of the table that fits, with the parsers that can be used for this model.

    Args:
        folder: of the tokenizer and config.json.
        given_template: the text of a chat template that is used instead of the model's.
        uses_tekken: whether a tekken.json is the tokenizer, if there is one.
    """
    by_tekken = uses_tekken and (folder / "tekken.json").is_file()
    template = _tekken(folder) if by_tekken else given_template or chat_template(folder)
    types = _model_types(folder)
    for family in table()[0]:
        if bool(family.file) == by_tekken and family.fits(folder, types, template):
            return _usable(family, folder, template)
    return None


def _usable(family: Family, folder: Path, template: str) -> Family:
    """Without a parser that the template shows no tools for, or whose tokens are missing."""
    if family.file or not family.template:
        return family
    tools, reasoning = family.tool_call_parser, family.reasoning_parser
    files = (folder / name for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    if not (shows_tools(template) and _has_tokens(tokenizer, "tool_call_parser", tools)):
        tools = None
    if not _has_tokens(tokenizer, "reasoning_parser", reasoning):
        reasoning = None
    return replace(family, tool_call_parser=tools, reasoning_parser=reasoning)


def chat_template(folder: Path) -> str:
    """The template that a model brings; of several, that for tools. Empty if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):
            named = {one["name"]: one["template"] for one in found}
            found = named.get("tool_use") or named.get("default")
        if found:
            return str(found)
    return ""


def shows_tools(template: str) -> bool:
    return TOOL_NAME in _rendered(template, tools=[TOOL])


def thinking(template: str) -> str:
    """What the end of the prompt says of thinking: "on", "off", "always" or "unsaid"."""
    asked = _rendered(template)
    if CLOSED.search(asked):
        return "off"
    if CLOSED.search(_rendered(template, enable_thinking=False, thinking=False)):
        return "on"
    return "always" if OPEN.search(asked) else "unsaid"


def _rendered(template: str, **options: Any) -> str:
    """A short chat as this template's prompt; empty where the template refuses it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [[{"role": "user", "content": "Hello"}]],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="",
            eos_token="",
            **options,
        )
    except (TemplateError, TypeError, ValueError, KeyError):
        return ""
    return str(rendered[0][0])


def _tekken(folder: Path) -> str:
    """The special tokens of Mistral's own tokenizer; newer files list them."""
    listed = _json(folder / "tekken.json").get("special_tokens") or []
    return " ".join(one["token_str"] for one in listed)


def _model_types(folder: Path) -> set[str]:
    config = _json(folder / "config.json")
    return {
        part["model_type"]
        for part in (config, config.get("text_config") or {})
        if "model_type" in part
    }


def _has_tokens(tokenizer: str, option: str, parser: str | None) -> bool:
    """Whether its files hold the tokens without which vLLM would not start this parser."""
    return all(
        json.dumps(token) in tokenizer or json.dumps(token, ensure_ascii=False) in tokenizer
        for token in table()[1][option].get(parser or "", ())
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read
