"""A handler read anew, while the engine and what its `setup` made stay."""

from __future__ import annotations

import importlib
import logging
import sys
from types import FunctionType, ModuleType
from typing import Any

from worker import handler as default
from worker import loading
from worker.errors import SettingsError
from worker.job import chunks, routes
from worker.job import input as job_input
from worker.loading import Handler

log = logging.getLogger(__name__)

OURS: tuple[ModuleType, ...] = (job_input, chunks, routes, default)
"""What is read anew where HANDLER is unset; each may import those before it."""


class Reloading:
    """HANDLER, loaded once and then as often as its author likes."""

    def __init__(self, name: str | None) -> None:
        self.handler: Handler = loading.load(name)
        self._name = name
        self._before = self._state()
        self._made: dict[str, dict[str, object]] = {}

    def remember_setup(self) -> None:
        """Call it after `setup`: what that has assigned or put into is kept from now on."""
        for module, names in self._state().items():
            before = self._before.get(module)
            if before is not None:
                self._made[module] = {
                    name: held[0].value for name, held in names.items() if held != before.get(name)
                }

    def again(self) -> bool:
        """Read it again; code that does not even load leaves the old in place and is told."""
        if self._name is None:
            return self._ours_again()
        old = loading.unload(self.handler)
        try:
            self.handler = loading.load(self._name)
        except SettingsError as error:
            loading.unload(self.handler)
            sys.modules.update(old)
            log.error("%s; mend it and try again", error)
            return False
        for module, made in self._made.items():
            if new := sys.modules.get(module):
                vars(new).update(made)
        return True

    def _ours_again(self) -> bool:
        for module in OURS:
            try:
                importlib.reload(module)
            except Exception:  # whatever the user's edit raises is for him to read
                log.exception("%s does not load; mend it and try again", module.__name__)
                return False
        self.handler = loading.load(None)
        return True

    def _state(self) -> dict[str, dict[str, tuple[_Same, object]]]:
        """Module → name → what it holds, and what that holds."""
        if self._name is None:
            return {}
        return {
            name: {key: (_Same(value), _inside(value)) for key, value in vars(module).items()}
            for name, module in loading.modules_of(self.handler).items()
        }


class _Same:
    """An object that equals itself alone, whatever its own `==` says."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _inside(value: Any) -> object:
    """What `value` holds one level down, to be compared by identity."""
    if isinstance(value, ModuleType | FunctionType | type):
        return None
    if isinstance(value, dict):
        return [(_Same(key), _Same(item)) for key, item in value.items()]
    if isinstance(value, list | set):
        return [_Same(item) for item in value]
    return [(key, _Same(item)) for key, item in getattr(value, "__dict__", {}).items()]
