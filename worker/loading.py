"""HANDLER → the handler: found, loaded, checked, set up, and called for a job."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from preload.errors import first_line
from worker import handler as default
from worker.engines.base import Engine
from worker.errors import BadRequest, JobFailed, SettingsError, SetupFailed
from worker.job.problems import checked

log = logging.getLogger(__name__)

Job = dict[str, Any]
Answer = Callable[[Job, Engine], AsyncGenerator[Any, None]]


@dataclass(frozen=True)
class Handler:
    """What answers jobs.

    Args:
        module: what it was loaded from.
        handler: an async generator function of a job and the engine.
        setup: called once with the engine, before the first job.
        input: what `job["input"]` is made an instance of.
    """

    module: ModuleType
    handler: Answer
    setup: Callable[[Engine], Awaitable[None]] | None = None
    input: type[BaseModel] | None = None

    async def set_up(self, engine: Engine) -> None:
        """Call `setup`.

        Raises:
            SetupFailed: it raised.
        """
        if self.setup is None:
            return
        try:
            await self.setup(engine)
        except Exception as error:
            raise SetupFailed(
                f"the handler's setup failed: {place_of(error, self.module)}"
            ) from error

    async def answer(self, job: Job, engine: Engine) -> AsyncGenerator[Any, None]:
        """Run one job; an `openai_route` goes to the engine, whatever the handler.

        Yields:
            what the handler yields.

        Raises:
            BadRequest: the input is not what `Input` allows.
            JobFailed: the handler yielded an error.
        """
        given = job.get("input")
        handler = self.handler
        if isinstance(given, dict) and "openai_route" in given:
            handler = default.handler
        elif self.input:
            try:
                job = {**job, "input": checked(self.input, given)}
            except ValueError as error:
                raise BadRequest(str(error)) from None
        async with aclosing(handler(job, engine)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, dict) and chunk.get("error") is not None:
                    raise JobFailed(chunk["error"])
                yield chunk


def load(name: str | None) -> Handler:
    """The handler that HANDLER names: a Python file, a folder or a module; None: ours.

    Raises:
        SettingsError: there is none, it does not load, or it is not what it must be.
    """
    if not name:
        return _handler_of(default)
    try:
        return _handler_of(_module(name))
    except _Unfit as problem:
        raise SettingsError([f"HANDLER={name}: {problem}"]) from None


def modules_of(handler: Handler) -> dict[str, ModuleType]:
    """The handler's module and what stands beside it, but for installed packages and ours."""
    assert handler.module.__file__
    folder = Path(handler.module.__file__).parent
    found = {}
    for name, module in sys.modules.items():
        path = Path(getattr(module, "__file__", None) or "")
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        ours = name.partition(".")[0] in {"worker", "preload", "__main__"}
        if folder in path.parents and not installed and not ours:
            found[name] = module
    return found


def unload(handler: Handler) -> dict[str, ModuleType]:
    """Forget them, so that `load` reads them anew; returns what was forgotten."""
    forgotten = modules_of(handler)
    for name in forgotten:
        del sys.modules[name]
    return forgotten


class _Unfit(Exception):
    """Why it can't be a handler."""


def _module(name: str) -> ModuleType:
    path = Path(name).expanduser()
    if path.is_dir():
        candidates = [path / "handler.py", path / f"{path.resolve().name}.py"]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None and not ("/" not in name and (path / "__init__.py").is_file()):
            raise _Unfit("the folder holds no handler.py")
        path = found or path
    if path.is_file():
        return _of_file(path.resolve())
    if "/" in name or path.suffix == ".py":
        raise _Unfit("there is no such file")
    return _imported(name)


def _of_file(path: Path) -> ModuleType:
    """The file as a module of its own name, with what stands beside it importable."""
    if (known := sys.modules.get(path.stem)) and getattr(known, "__file__", None) != str(path):
        raise _Unfit(f"a module called {path.stem} is loaded already; give the file another name")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return _imported(path.stem)


def _imported(name: str) -> ModuleType:
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        log.debug("%s does not load", name, exc_info=True)
        raise _Unfit(f"it does not load: {place_of(error)}") from None


def place_of(error: BaseException, module: ModuleType | None = None) -> str:
    """`file:line: what was raised`, by the last line of the user's that was reached."""
    said = first_line(error)
    kind = type(error).__name__
    sentence = kind if said == kind else f"{kind}: {said}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if module and module.__file__:
        folder = str(Path(module.__file__).parent)
        frames_of_user = [frame for frame in frames if frame.filename.startswith(folder)]
    else:
        ours = (__file__, importlib.__file__, "<frozen ")
        frames_of_user = [frame for frame in frames if not frame.filename.startswith(ours)]
    for frame in frames_of_user[-1:]:
        return f"{frame.filename}:{frame.lineno}: {sentence}"
    return sentence


def _handler_of(module: ModuleType) -> Handler:
    """What the module has to offer, checked."""
    handler = getattr(module, "handler", None)
    if handler is None:
        raise _Unfit(f"{module.__file__}:1: it has no handler; it must be an async generator")
    if not inspect.isasyncgenfunction(handler):
        raise _Unfit(
            f"{_line_of(handler, module)}: handler is no async generator; it must be "
            "`async def handler(job, engine)` with a yield in it"
        )
    _takes(handler, "handler", ("job", "engine"), module)
    setup = getattr(module, "setup", None)
    if setup is not None:
        if not inspect.iscoroutinefunction(setup):
            raise _Unfit(f"{_line_of(setup, module)}: setup must be `async def setup(engine)`")
        _takes(setup, "setup", ("engine",), module)
    model = getattr(module, "Input", None)
    if model is not None and not (inspect.isclass(model) and issubclass(model, BaseModel)):
        raise _Unfit(f"{_line_of(model, module)}: Input must be a subclass of pydantic.BaseModel")
    return Handler(module, handler, setup, model)


def _takes(
    function: Callable[..., Any], name: str, wanted: tuple[str, ...], module: ModuleType
) -> None:
    try:
        inspect.signature(function).bind(*wanted)
    except TypeError:
        raise _Unfit(
            f"{_line_of(function, module)}: {name} must take {' and '.join(wanted)}"
        ) from None


def _line_of(thing: Any, module: ModuleType) -> str:
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (TypeError, OSError):
        return f"{module.__file__}:1"
