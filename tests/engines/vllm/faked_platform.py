"""Print what vLLM would run with on a GPU that is not here: two configurations, as JSON.

`python -m tests.engines.vllm.faked_platform NAME MAJOR.MINOR GIB SETTINGS COMMAND_LINE`
"""

import dataclasses
import json
import re
import sys
import types
from typing import Any

NOT_COMPARED = {"instance_id", "data_parallel_master_port", "_data_parallel_master_port_list"}
"""What differs from one configuration to the next by itself."""


def fake(name: str, capability: str, gib: int) -> None:
    """Let vLLM see one kind of GPU, before anything else of it is imported."""
    for module in ("vllm._C_stable_libtorch", "vllm._C", "vllm._moe_C"):
        sys.modules[module] = types.ModuleType(module)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    major, minor = map(int, capability.split("."))

    class Faked(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return gib << 30

        @classmethod
        def get_device_uuid(cls, device_id: int = 0) -> str:
            return "GPU-0"

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def log_warnings(cls) -> None:
            pass

        @classmethod
        def device_count(cls) -> int:
            return 8

    vllm.platforms._current_platform = Faked()


def fields(value: Any, path: str = "") -> dict[str, str]:
    """Every field below `value`, by its path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, str] = {}
        for field in dataclasses.fields(value):
            if field.name not in NOT_COMPARED:
                below = getattr(value, field.name, None)
                found |= fields(below, f"{path}.{field.name}" if path else field.name)
        return found
    return {path: re.sub(r" at 0x[0-9a-f]+", "", repr(value))}


def main() -> None:
    name, capability, gib, given, command_line = sys.argv[1:]
    if gib != "0":
        fake(name, capability, int(gib))
    from worker.engines.vllm.arguments import parsed
    from worker.engines.vllm.config import configuration, set_environment
    from worker.settings import Settings

    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = Settings(**json.loads(given))
    ours = parsed(settings)
    ours.model = settings.model
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(command_line))
    validate_parsed_serve_args(args)
    theirs = AsyncEngineArgs.from_cli_args(args)
    configured = theirs.create_engine_config(UsageContext.OPENAI_API_SERVER)
    print(
        json.dumps(
            {
                "tripod": fields(configuration(ours, settings, settings.model)),
                "vllm serve": fields(configured),
            }
        )
    )


if __name__ == "__main__":
    main()
