"""LoRA adapters: which ones ENGINE_ARGS names, and what an adapter's configuration says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from preload import choose
from preload.model import Model, ModelNameError, parse_adapter

OPTION = "lora_modules"
"""vLLM's option that names them."""


class AdapterConfig(BaseModel):
    """What of an `adapter_config.json` is needed; `r` and `rank_pattern` are ranks."""

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: int
    rank_pattern: dict[str, int] | None = None

    @property
    def rank(self) -> int:
        """The highest one of all its modules."""
        return max([self.r, *(self.rank_pattern or {}).values()])


def named(engine_args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters of ENGINE_ARGS as vLLM's objects: `name`, `path`, and what else was said.

    Raises:
        ValueError: one sentence about the first that is wrong.
    """
    given = next(
        (args for name, args in engine_args.items() if name.replace("-", "_") == OPTION), None
    )
    entries = given if isinstance(given, list) else [] if given is None else [given]
    found = [_entry(entry) for entry in entries]
    names = [entry["name"] for entry in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{OPTION}: two adapters have the name {twice}; each needs its own")
    return found


def _entry(entry: Any) -> dict[str, Any]:
    """An object, or the same as JSON text, or vLLM's short form `name=path`."""
    shown = entry if isinstance(entry, str) else json.dumps(entry)
    if isinstance(entry, str) and "=" in entry and not entry.lstrip().startswith("{"):
        name, _, path = entry.partition("=")
        entry = {"name": name, "path": path}
    elif isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except ValueError:
            entry = None
    strings = isinstance(entry, dict) and [entry.get("name"), entry.get("path")]
    if not strings or not all(isinstance(text, str) and text.strip() for text in strings):
        example = '{"name": "a", "path": "org/a"}'
        raise ValueError(f"{OPTION}: {shown} must be an object such as {example}")
    try:
        parse_adapter(entry["path"])
    except ModelNameError as error:
        raise ValueError(f"{OPTION}: path={entry['path']} {error}") from None
    return dict(entry)


def config(content: bytes) -> AdapterConfig:
    """Read an adapter_config.json.

    Raises:
        ValueError: why it is none of a LoRA adapter.
    """
    try:
        kind = json.loads(content).get("peft_type", "LORA")
        if kind == "LORA":
            return AdapterConfig.model_validate_json(content)
    except (ValidationError, ValueError, AttributeError):
        raise ValueError(f"its {choose.ADAPTER_CONFIG} can't be read as that of LoRA") from None
    raise ValueError(f"its {choose.ADAPTER_CONFIG} says {kind}, and vLLM serves LORA alone")


def missing(folder: Path) -> str | None:
    """What `folder` lacks to be an adapter, or None."""
    is_configured = (folder / choose.ADAPTER_CONFIG).is_file()
    if is_configured and any((folder / name).is_file() for name in choose.ADAPTER_WEIGHTS):
        return None
    return choose.no_adapter(is_configured)


def instead(model: Model, content: bytes) -> str:
    """What to do where MODEL names an adapter, which has this adapter_config.json."""
    try:
        base = json.loads(content).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    path = str(model)
    name = (model.repository or path).rpartition("/")[2]
    args = {"enable_lora": True, OPTION: [{"name": name, "path": path}]}
    of = f"of {base}" if base else "of a model that it does not name"
    return (
        f"it is a LoRA adapter {of}, and no model; set MODEL={base or '<that model>'} and "
        f"ENGINE_ARGS={json.dumps(args)}"
    )
