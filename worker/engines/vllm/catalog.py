"""What OpenLLM's catalog says of a model → the settings that vLLM gets."""

from __future__ import annotations

import logging
from typing import Any

from preload.entry import Entry
from worker.engines.options import underscored
from worker.engines.vllm.arguments import OWN_VARIABLES, argument_names
from worker.settings import Settings

log = logging.getLogger(__name__)

NOT_TAKEN = {*OWN_VARIABLES, "disable_log_stats"}
"""Options that Tripod sets itself; of these only `max_model_len` is taken, as below."""


def applied(settings: Settings, entry: Entry) -> Settings:
    """The catalog's engine settings below the user's own.

    ENGINE_ARGS wins option by option, and MAX_MODEL_LEN where it is not its default. What vLLM
    no longer knows is dropped with a warning.
    """
    given = set(map(underscored, settings.engine_args))
    taken: dict[str, Any] = {}
    for name, value in entry.engine_args.items():
        if name in NOT_TAKEN or name in given:
            continue
        if name in argument_names():
            taken[name] = value
        else:
            log.warning("the catalog's %s=%s is dropped: vLLM no longer knows it", name, value)
    changed: dict[str, Any] = {"engine_args": taken | settings.engine_args}
    length = entry.engine_args.get("max_model_len")
    if length and settings.max_model_len == type(settings).model_fields["max_model_len"].default:
        changed["max_model_len"] = taken["max_model_len"] = length
    if taken:
        shown = ", ".join(f"{name}={_short(value)}" for name, value in taken.items())
        log.info("from OpenLLM's catalog (%s): %s", entry.bento, shown)
    return settings.model_copy(update=changed)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
