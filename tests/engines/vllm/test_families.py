"""Which parsers a model gets from its files, and that they read what its family writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    MODEL,
    ROOT,
    START,
    TOKEN_BYTES,
    WORKER,
    platform,
    soon,
    start,
    stop,
    worker_environment,
)
from worker.engines.vllm.families import table

pytestmark = pytest.mark.engine


def data(name: str, key: str) -> list[dict[str, Any]]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = tomllib.loads(text)[key]
    return entries


RECORDED = data("model_text.toml", "family")
LOOK_ALIKES = {one["name"]: one for one in data("look_alikes.toml", "model")}
READ = [one for one in RECORDED if "unread" not in one]
FAMILIES = {family.name: family for family in table()[0]}
OPTIONS = ("tool_call_parser", "reasoning_parser")
PAGE = (ROOT / "docs" / "reference" / "vllm.md").read_text(encoding="utf-8")

JSON_CALLS = "return a json object within <tool_call></tool_call> XML tags"
SWITCH = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
THINKS = ["<think>", "</think>"]


def template(instruction: str = "", system: str = "", ending: str = "") -> str:
    """Small, with what a family's own template is known by; without instruction, without tools."""
    tools = (
        "{% if tools %}" + instruction + "{{ tools | tojson }}{% endif %}" if instruction else ""
    )
    return f"{tools}{system}{{{{ messages[0].content }}}}{ending}"


QWEN3 = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
NO_TOOLS = {"enable_auto_tool_choice": None, "tool_call_parser": None}

OVERRULED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_num_seqs": 7}, {}),
    ({"tool_call_parser": None}, NO_TOOLS),
    ({"enable_auto_tool_choice": False}, NO_TOOLS),
    ({"tool-call-parser": "qwen3_xml"}, {**NO_TOOLS, "tool_call_parser": "qwen3_xml"}),
    (
        {"tool_call_parser": "qwen3_xml", "enable_auto_tool_choice": True},
        {"tool_call_parser": "qwen3_xml"},
    ),
    ({"reasoning_parser": None}, {"reasoning_parser": None}),
    ({"reasoning-parser": "deepseek_r1"}, {"reasoning_parser": "deepseek_r1"}),
    (
        {"structured_outputs_config": {"reasoning_parser": "deepseek_r1"}},
        {"reasoning_parser": None},
    ),
    (
        {"reasoning_parser": None, "enable_auto_tool_choice": False},
        {**NO_TOOLS, "reasoning_parser": None},
    ),
    ({"chat_template": "{{ messages[0].content }}"}, {**NO_TOOLS, "reasoning_parser": None}),
]
"""ENGINE_ARGS, and in what a Qwen3 then departs from its family."""

PLACES: dict[str, dict[str, Any]] = {
    "chat_template.json": {"chat_template": template(JSON_CALLS)},
    "tokenizer_config.json": {"chat_template": template(JSON_CALLS)},
    "a list in tokenizer_config.json": {
        "chat_template": [
            {"name": "default", "template": template()},
            {"name": "tool_use", "template": template(JSON_CALLS)},
        ]
    },
}
"""Where a template may stand, other than in chat_template.jinja."""


def text_of(one: dict[str, Any]) -> str:
    """The template of an entry of the data."""
    return template(*(one.get(name, "") for name in ("instruction", "system", "ending")))


def written(
    folder: Path, config: dict[str, Any], text: str, tokens: list[str], tekken: Any = None
) -> str:
    """The files of a model, without its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(text)
    added = {index: {"content": token} for index, token in enumerate(tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    if tekken is not None:
        listed = [{"token_str": token} for token in tekken]
        (folder / "tekken.json").write_text(json.dumps({"special_tokens": listed}))
    return str(folder)


def tasks(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, one in enumerate([*RECORDED, *LOOK_ALIKES.values()]):
        text, tokens = text_of(one), one.get("tokens", [])
        place = written(folder / str(number), one["config"], text, tokens, one.get("tekken"))
        texts = {"template": text, "tokens": tokens, "texts": one.get("texts", [])}
        found[one.get("family") or one["name"]] = {"folder": place, **texts}
    for name, content in PLACES.items():
        place = written(folder / name, {"model_type": "qwen2"}, "", [])
        (Path(place) / "chat_template.jinja").unlink()
        (Path(place) / name.split()[-1]).write_text(json.dumps(content))
        found[name] = {"folder": place}
    switched = template(JSON_CALLS, ending=SWITCH)
    qwen3 = written(folder / "qwen3", {"model_type": "qwen3"}, switched, THINKS)
    for number, (given, _) in enumerate(OVERRULED):
        found[f"overruled {number}"] = {"folder": qwen3, "given": given}
    both = written(folder / "both", {"model_type": "mistral"}, template("[TOOL_CALLS]"), [], [])
    found["tekken"] = {"folder": both}
    found["no tekken"] = {"folder": both, "given": {"tokenizer_mode": "hf"}}
    (folder / "empty").mkdir()
    found["empty"] = {"folder": str(folder / "empty")}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = tasks(tmp_path_factory.mktemp("families"))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.engines.vllm.readings"],
        cwd=ROOT,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def parsers(found: dict[str, Any], name: str) -> tuple[Any, Any]:
    one = found["done"][name]
    assert bool(one["tool_call_parser"]) == bool(one["enable_auto_tool_choice"])
    return one["tool_call_parser"], one["reasoning_parser"]


def test_vllm_has_every_parser_of_the_table(found: dict[str, Any]) -> None:
    for family in FAMILIES.values():
        for option in OPTIONS:
            assert getattr(family, option) in [None, *found["known"][option]], family.name


@pytest.mark.parametrize("option", OPTIONS)
def test_the_table_names_the_tokens_that_a_parser_needs(found: dict[str, Any], option: str) -> None:
    needed = table()[1][option]
    used = {getattr(family, option) for family in FAMILIES.values()} - {None}
    assert set(needed) <= used
    for name in used:
        without, with_tokens = found[f"{option} {name}"]
        assert with_tokens, name
        assert without == (name not in needed), name


def test_each_family_is_recorded() -> None:
    assert [one["family"] for one in RECORDED] == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_and_said_in_one_line(found: dict[str, Any], family: str) -> None:
    entry = FAMILIES[family]
    assert parsers(found, family) == (entry.tool_call_parser, entry.reasoning_parser)
    [line] = found["done"][family]["said"].splitlines()
    assert f"as for the family {family}; " in line
    for option in OPTIONS:
        name = getattr(entry, option)
        assert (f"{option}={name}" in line) if name else (option not in line)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_only_looks_like_a_family_is_not(found: dict[str, Any], name: str) -> None:
    expected = tuple(LOOK_ALIKES[name].get(option) for option in OPTIONS)
    assert parsers(found, name) == expected


@pytest.mark.parametrize("family", [one["family"] for one in READ])
def test_its_parsers_read_what_it_writes(found: dict[str, Any], family: str) -> None:
    [recorded] = [one for one in READ if one["family"] == family]
    read = found["done"][family]["read"]
    lost = 0
    for text, ways in zip(recorded["texts"], read, strict=True):
        expected = {
            "reasoning": text.get("reasoning", ""),
            "content": text.get("content", ""),
            "calls": [["get_weather", arguments] for arguments in text.get("calls", [])],
        }
        for way, got in ways.items():
            many = way not in {"whole", "by 1"}
            if many and expected["calls"] and recorded.get("loses_calls"):
                lost += got != expected
            else:
                assert got == expected, (way, text)
    assert bool(lost) == recorded.get("loses_calls", False), "vLLM reads this otherwise by now"


@pytest.mark.parametrize("number", range(len(OVERRULED)), ids=lambda one: str(OVERRULED[one][0]))
def test_engine_args_overrule(found: dict[str, Any], number: int) -> None:
    one = found["done"][f"overruled {number}"]
    assert {name: one[name] for name in QWEN3} == QWEN3 | OVERRULED[number][1]
    chosen = OVERRULED[number][1].keys() < QWEN3.keys()
    assert bool(one["said"]) == chosen


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_wherever_it_stands(found: dict[str, Any], place: str) -> None:
    assert parsers(found, place) == ("hermes", None)


def test_mistrals_tokenizer_counts_where_it_is_used(found: dict[str, Any]) -> None:
    assert "by Mistral's tokenizer" in found["done"]["tekken"]["said"]
    assert parsers(found, "no tekken") == (None, None)  # no such token
    assert parsers(found, "empty") == (None, None)


def test_the_page_has_the_table() -> None:
    rows = [
        f"| {family.name} | {named(family.tool_call_parser)} | {named(family.reasoning_parser)} "
        f"| {family.about} |"
        for family in FAMILIES.values()
    ]
    heads = ["| family | tool calls | thinking | note |", "|---|---|---|---|"]
    text = "\n".join([*heads, *rows])
    assert text + "\n\n" in PAGE, f"vllm.md must hold this table:\n{text}"


def named(parser: str | None) -> str:
    return f"`{parser}`" if parser else ""


def test_the_page_names_who_loses_calls() -> None:
    losers = {one["family"] for one in RECORDED if one.get("loses_calls")}
    names = {FAMILIES[name].tool_call_parser for name in losers}
    sentence = PAGE.partition("where many tokens come in one delta")[0].rpartition("\n\n")[2]
    assert set(re.findall(r"`([^`]+)`", sentence)) == names


async def test_tools_work_without_an_option(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(template(JSON_CALLS, ending="<|assistant|>\n"))
    asked = {
        "model": "small",
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}],
        "tool_choice": "auto",
        "max_tokens": 8,
    }
    async with platform() as served:
        environment = worker_environment(
            **served.environment(),
            MODEL=str(folder),
            SERVED_MODEL_NAME="small",
            ENGINE_ARGS=json.dumps({"kv_cache_memory_bytes": 4096 * TOKEN_BYTES}),
        )
        process, output = start(WORKER, environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            assert output.find("tool_call_parser=hermes, as for the family Hermes"), output.text()
            job = {"openai_route": "/v1/chat/completions", "openai_input": asked}
            end = await served.answer({"id": "tools", "input": job})
            [answer] = end["output"]
            assert answer["choices"][0]["message"]["role"] == "assistant", answer
        finally:
            assert stop(process) == 0
