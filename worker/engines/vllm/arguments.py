"""ENGINE_ARGS as vLLM's own parser takes them: names without importing it, values with it."""

from __future__ import annotations

import ast
import json
import re
from argparse import Action, ArgumentTypeError, BooleanOptionalAction, Namespace, _AppendAction
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from preload.errors import first_line
from worker.engines.options import dashed, problems, underscored
from worker.engines.vllm import lora
from worker.errors import SettingsError
from worker.settings import Settings

OWN_VARIABLES: Mapping[str, str] = {
    "model": "MODEL",
    "revision": "MODEL=org/name@revision",
    "max_model_len": "MAX_MODEL_LEN",
    "hf_token": "HF_TOKEN",
    "served_model_name": "SERVED_MODEL_NAME",
    "host": "HOST",
    "port": "PORT",
    "api_key": "API_KEY",
}
"""Options of vLLM that have a variable of their own."""

ARGUMENT_CLASSES = {"EngineArgs", "AsyncEngineArgs", "BaseFrontendArgs", "FrontendArgs"}
"""What in vLLM's source names its options."""


@cache
def argument_names() -> frozenset[str]:
    """vLLM's own option names, read from its source without importing it."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vllm")
    package = Path(spec.submodule_search_locations[0])
    sources = [package / "engine/arg_utils.py", package / "entrypoints/launchers/cli_args.py"]
    return frozenset(
        field.target.id
        for source in sources
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in ARGUMENT_CLASSES
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def argument_problems(args: dict[str, Any]) -> list[str]:
    """One line for each name in ENGINE_ARGS that vLLM does not know or Tripod sets itself."""
    try:
        known = argument_names() if args else frozenset[str]()
    except ModuleNotFoundError:
        return ["vLLM is not installed here"]
    found = problems(map(underscored, args), known, OWN_VARIABLES, "vLLM")
    return found + lora.argument_problems(args)


def parsed(settings: Settings) -> Namespace:
    """ENGINE_ARGS through the parser of `vllm serve`, which checks the values.

    Raises:
        SettingsError: its sentence about a value, or about values that contradict each other.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.exceptions import VLLMClientError
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            sentence = re.sub(r" \[type=.*", "", " ".join(message.split()))
            raise SettingsError([f"ENGINE_ARGS: {sentence}"])

    parser = make_arg_parser(Parser())
    arguments = ["--served-model-name", settings.served_model_name or settings.model]
    for name, value in settings.engine_args.items():
        option = "--" + dashed(name)
        if value is not None:
            arguments += _words(parser._option_string_actions.get(option), option, value)
    namespace: Namespace = parser.parse_args(arguments)
    try:
        validate_parsed_serve_args(namespace)
    except (TypeError, ValueError, VLLMClientError) as error:
        said = first_line(error).removeprefix("Error: ")
        raise SettingsError([f"ENGINE_ARGS: {said}"]) from None
    is_asked = namespace.enable_per_request_metrics or "disable_log_stats" in map(
        underscored, settings.engine_args
    )
    if settings.mode_to_run != "api" and not is_asked:
        namespace.disable_log_stats = True  # only /metrics reads them
    return namespace


def _words(action: Action | None, option: str, value: object) -> list[str]:
    """What a user would type for one option, as the parser's own action for it takes it."""
    if isinstance(value, bool) and isinstance(action, BooleanOptionalAction):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, bool) and action is not None and action.nargs == 0:
        return [option] if value else []
    if isinstance(value, list) and action is not None:
        if action.nargs in {"*", "+"}:
            return [option, *map(_text, value)]
        if isinstance(action, _AppendAction):
            return [f"{option}={_text(one)}" for one in value]
        return [f"{option}={_one_text(action, value)}"]
    return [f"{option}={_text(value)}"]


def _one_text(action: Action, values: list[Any]) -> str:
    """The text that the option's own type reads as this list: JSON, or else commas between."""
    commas = ",".join(map(str, values))
    with suppress(ValueError, TypeError, ArgumentTypeError):
        if callable(action.type) and action.type(commas) == values:
            return commas
    return _text(values)


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
