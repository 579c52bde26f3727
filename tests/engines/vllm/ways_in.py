"""How `vllm serve` and Tripod would start vLLM, every field of it, for many cases.

`python -m tests.engines.vllm.ways_in cuda|cpu` reads tasks from standard input, does each in a
process of its own, and prints as JSON what each found: for each of its cases the fields by path.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

from preload.weights import Weights
from tests.engines.vllm import faked_platform

NOT_COMPARED = {"instance_id", "data_parallel_master_port", "_data_parallel_master_port_list"}
"""What differs from one configuration to the next by itself."""

OF_THE_COMMAND = {"subparser", "dispatch_function", "model_tag"}
"""What is no option of the server."""

Found = dict[str, str]


class Started(BaseException):
    """vLLM would start now."""

    def __init__(self, config: Any, options: dict[str, Any]) -> None:
        self.config = config
        self.options = options


def fields(value: Any, path: str = "", seen: dict[int, str] | None = None) -> Found:
    """Every field below `value`, by its path; what stands in two places is told once."""
    seen = {} if seen is None else seen
    if isinstance(value, type | FunctionType):
        return {path: f"{value.__module__}.{value.__qualname__}"}
    if dataclasses.is_dataclass(value):
        if id(value) in seen:
            return {path: f"the same as {seen[id(value)]}"}
        seen[id(value)] = path
        names = [field.name for field in dataclasses.fields(value)] + list(vars(value))
        below = {
            f"{path}.{name}" if path else name: getattr(value, name, None)
            for name in names
            if name not in NOT_COMPARED
        }
        found = {}
    elif isinstance(value, dict):
        below = {f"{path}[{key!r}]": value[key] for key in value}
        found = {path: f"{len(value)} keys"}
    elif isinstance(value, list | tuple):
        below = {f"{path}[{index}]": one for index, one in enumerate(value)}
        found = {path: f"{type(value).__name__} of {len(value)}"}
    else:
        said = sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)
        return {path: re.sub(r" at 0x[0-9a-f]+", "", str(said))}
    for name, one in below.items():
        found |= fields(one, name, seen)
    return found


@contextmanager
def nothing_starts() -> Iterator[None]:
    """Raise `Started` where an engine would start."""
    from vllm.v1.engine.async_llm import AsyncLLM

    signature = inspect.signature(AsyncLLM.from_vllm_config)

    def from_vllm_config(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = dict(bound.arguments)
        options["client_addresses"] = options["client_addresses"] or None
        raise Started(options.pop("vllm_config"), options)

    def get_class(config: Any) -> None:  # asked for where several front processes are to start
        raise Started(config, {})

    with (
        mock.patch.object(AsyncLLM, "from_vllm_config", from_vllm_config),
        mock.patch("vllm.entrypoints.cli.serve.Executor", mock.Mock(get_class=get_class)),
        mock.patch("vllm.entrypoints.launchers.api_server.entry.setup_server", no_socket),
        mock.patch("vllm.entrypoints.cli.serve.setup_server", no_socket),
    ):
        yield


def no_socket(args: Any, **_: Any) -> tuple[str, None]:
    return "", None


def by_vllm_serve(case: dict[str, Any]) -> tuple[Any, Started]:
    """What `main` of vLLM's own command does with the command line of a case."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:  # instead of printing it
            raise ValueError(message)

    cli_env_setup()
    parser = Parser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", case["folder"], *case["options"]])
    configure_logging_from_args(args)
    command.validate(args)
    try:
        command.cmd(args)
    except Started as started:
        return args, started
    raise AssertionError("vllm serve did not start")


def by_tripod(case: dict[str, Any]) -> tuple[Any, Started]:
    from worker import engines
    from worker.engines.vllm.engine import VllmEngine
    from worker.settings import Settings

    settings = Settings(model=case["folder"]).model_copy(update=case["settings"])
    engine = engines.create("vllm", settings, Weights(Path(case["folder"]), "the case's"))
    assert isinstance(engine, VllmEngine)
    try:
        engine.load()
    except Started as started:
        return engine._args, started
    raise AssertionError("Tripod did not start vLLM")


def other_context() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    create = AsyncEngineArgs.create_engine_config
    return mock.patch.object(
        AsyncEngineArgs,
        "create_engine_config",
        lambda args, context: create(args, UsageContext.ENGINE_CONTEXT),
    )


def new_default() -> Any:
    from worker.engines.vllm import engine

    configuration = engine.configuration

    def configured(args: Any, *rest: Any) -> Any:
        args.gpu_memory_utilization = 0.8
        return configuration(args, *rest)

    return mock.patch.object(engine, "configuration", configured)


CHANGES: dict[str, Callable[[], Any]] = {
    "another usage context": other_context,
    "a new default": new_default,
    "no checks": lambda: mock.patch(
        "vllm.entrypoints.launchers.cli_args.validate_parsed_serve_args"
    ),
    "no plugins": lambda: mock.patch("worker.engines.vllm.engine.import_parsers"),
    "a model's own error": lambda: mock.patch(
        "worker.engines.vllm.engine.configuration", side_effect=AssertionError("no rope")
    ),
}
"""What somebody may do to Tripod's way in."""


def found(way: str, case: dict[str, Any]) -> Found:
    """All that one case comes to; of a refusal, the sentence as `refused`."""
    environment = dict(os.environ)
    try:
        args, started = (by_tripod if way == "tripod" else by_vllm_serve)(case)
    except Exception as error:  # noqa: BLE001 - whatever it is, both must refuse
        return {"refused": str(error)}
    finally:
        changed = {name: repr(os.environ.get(name)) for name in os.environ | environment}
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    options = {name: value for name, value in vars(args).items() if name not in OF_THE_COMMAND}
    told = fields(started.config)
    for place, values in (("args", options), ("start", started.options)):
        for name, value in values.items():
            told |= fields(value, f"{place}.{name}")
    return {
        **told,
        **{name: value for name, value in changed.items() if name.startswith(("VLLM_", "TORCH"))},
        "tool parsers": str(sorted(ToolParserManager.list_registered())),
        "reasoning parsers": str(sorted(ReasoningParserManager.list_registered())),
    }


def done(task: dict[str, Any]) -> list[Found]:
    faked_platform.chosen = faked_platform.MACHINES[task["machine"]]
    with nothing_starts(), CHANGES.get(task.get("change"), nullcontext)():
        return [found(task["way"], case) for case in task["cases"]]


def main() -> None:
    tasks = json.load(sys.stdin)
    if sys.argv[1] == "cuda":
        faked_platform.fake_cuda()
    for module in ("vllm.entrypoints.cli.serve", "vllm.v1.engine.async_llm"):
        importlib.import_module(module)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print("\n" + json.dumps(pool.map(done, tasks, chunksize=1)))


if __name__ == "__main__":
    main()
