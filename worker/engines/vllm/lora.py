"""LoRA adapters: found as a model is found, checked against it, and the rank that they need."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from preload import adapters, choose, weights
from preload.adapters import AdapterConfig
from preload.errors import WeightsError, first_line
from preload.model import Model, parse_adapter
from worker.engines.options import underscored
from worker.errors import EngineStartError, SettingsError
from worker.settings import Settings

log = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for max_lora_rank."""

DEFAULT_RANK = 16
"""vLLM's own."""

PACKED = ("I", "U")
"""How safetensors' names of integer types begin: quantised weights have another shape."""

_MATRIX = re.compile(
    r"base_model\.model\.(?P<module>(?P<before>.*\.layers\.)\d+(?P<after>\..*))"
    r"\.lora_(?P<which>[AB])\.weight"
)
Shapes = dict[str, list[int]]


def argument_problems(args: dict[str, Any]) -> list[str]:
    """What is wrong with the adapters that ENGINE_ARGS names, found without looking for them."""
    try:
        named = adapters.named(args)
    except ValueError as error:
        return [str(error)]
    if named and not _underscored(args).get("enable_lora"):
        return ['lora_modules needs "enable_lora": true beside it']
    return []


def applied(settings: Settings, base: Path) -> Settings:
    """ENGINE_ARGS with the folders of the adapters, and with the rank that they need.

    Args:
        base: the folder of the model that they are for.

    Raises:
        WeightsError: an adapter is nowhere to be had, or is none.
        SettingsError: it does not fit the model or another option.
    """
    args = _underscored(settings.engine_args)
    named = adapters.named(args)
    if not named:
        return settings
    served = settings.served_model_name or settings.model
    if any(one["name"] == served for one in named):
        raise SettingsError(
            [f"ENGINE_ARGS lora_modules: the name {served} is that of the model itself"]
        )
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    given = args.get("max_lora_rank")
    most = int(str(given)) if str(given).isdecimal() else RANKS[-1]
    highest = 0
    for one in named:
        adapter = parse_adapter(one["path"])
        found = weights.find(adapter, token=token)
        log.info("adapter %s: %s", one["name"], found.why)
        try:
            config = adapters.config((found.folder / choose.ADAPTER_CONFIG).read_bytes())
        except ValueError as error:
            raise WeightsError(f"{adapter.label}: {error}") from None
        _check(adapter, config, found.folder, settings, base)
        if config.rank > most:
            raise SettingsError([_rank_problem(adapter, config.rank, most)])
        highest = max(highest, config.rank)
        one["path"] = str(found.folder)
    args[adapters.OPTION] = named
    if given is None and highest > DEFAULT_RANK:
        args["max_lora_rank"] = _step(highest)
        log.info("max_lora_rank=%d, for an adapter of rank %d", args["max_lora_rank"], highest)
    return settings.model_copy(update={"engine_args": args})


def start_error(error: Exception, args: Namespace, state: Any) -> EngineStartError:
    """Why vLLM's app was not built: by an adapter that it does not take, or by something else."""
    models = getattr(state, "openai_serving_models", None)
    loaded = models.lora_requests if models else {}
    refused = next((one for one in args.lora_modules or () if one.name not in loaded), None)
    if models and refused:
        return EngineStartError(
            f"ENGINE_ARGS lora_modules path={refused.path}: vLLM does not take this adapter: "
            f"{first_line(error)}"
        )
    return EngineStartError(f"vLLM did not start: {first_line(error)}")


def _underscored(args: dict[str, Any]) -> dict[str, Any]:
    return {underscored(name): value for name, value in args.items()}


def _step(rank: int) -> int:
    return next(step for step in RANKS if step >= rank)


def _rank_problem(adapter: Model, rank: int, most: int) -> str:
    if rank > RANKS[-1]:
        return f"{adapter.label}: its rank is {rank}, and vLLM serves {RANKS[-1]} at most"
    return (
        f"{adapter.label}: its rank is {rank}, and max_lora_rank={most} in ENGINE_ARGS; "
        f"set it to {_step(rank)}, or leave it out"
    )


def _check(
    adapter: Model, config: AdapterConfig, folder: Path, settings: Settings, base: Path
) -> None:
    """Refuse an adapter for a model of another shape; vLLM would cut it to size or fail late."""
    trained_on = config.base_model_name_or_path or "a model that it does not name"
    if differing := _differing(_shapes(folder / choose.ADAPTER_WEIGHTS[0]), base):
        raise SettingsError(
            [
                f"{adapter.label}: it is an adapter of {trained_on} and does not fit "
                f"MODEL={settings.model}: {differing}"
            ]
        )
    same = _last_part(trained_on) == _last_part(settings.model)
    if config.base_model_name_or_path and not same:
        log.warning("%s was trained on %s, and MODEL=%s", adapter.label, trained_on, settings.model)


def _last_part(name: str) -> str:
    """`org/Name@revision` → `name`."""
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()


def _differing(lora: Shapes, base: Path) -> str | None:
    """Which of the adapter's layers does not fit the model's, or None where all do.

    What is nowhere among the model's weights, or packed there, is left to vLLM.
    """
    files = sorted(base.glob("*.safetensors"))
    of_model = {name: shape for file in files for name, shape in _shapes(file).items()}
    for name, shape in lora.items():
        found = _MATRIX.fullmatch(name)
        if found is None or len(shape) != 2:
            continue
        weight = of_model.get(f"{found['module']}.weight")
        if weight is None and f"{found['before']}0{found['after']}.weight" in of_model:
            return f"the model has no {found['module']}"
        size = shape[1] if found["which"] == "A" else shape[0]
        if weight is not None and size not in weight:
            shown = " x ".join(map(str, weight))
            return f"{found['module']} is {shown} in the model, and {size} there"
    return None


def _shapes(file: Path) -> Shapes:
    """Of a safetensors file's tensors that are not packed; nothing where there is no such file.

    Raises:
        WeightsError: it can't be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: one.get_shape()
                for name, one in slices.items()
                if not one.get_dtype().startswith(PACKED)
            }
    except SafetensorError as error:
        raise WeightsError(f"{file} can't be read: {first_line(error)}") from None
