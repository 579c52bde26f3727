"""Machines that are not here, as vLLM would see them."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What vLLM asks a platform; without a capability it is the CPU that is here."""

    name: str
    capability: tuple[int, int] = (0, 0)
    gib: int = 0
    parallel: tuple[int, ...] = (1,)
    tokens: int = 2048
    sequences: int = 256


CPU = Machine("CPU", sequences=128)
GPUS = (
    Machine("NVIDIA H100 80GB HBM3", (9, 0), 80, (1, 2, 8), 8192, 1024),
    Machine("NVIDIA H200", (9, 0), 141, (1, 2, 8), 8192, 1024),
    Machine("NVIDIA B200", (10, 0), 180, (1, 2, 8), 16384, 1024),
    Machine("NVIDIA A100-SXM4-80GB", (8, 0), 80, (1, 2, 8)),
    Machine("NVIDIA L40S", (8, 9), 48, (1, 2, 8)),
    Machine("NVIDIA GeForce RTX 4090", (8, 9), 24, (1, 2)),
)
MACHINES = {machine.name: machine for machine in (CPU, *GPUS)}
"""`tokens` a step and `sequences` at once: what vLLM chooses there for a server."""

COMPILED = (
    "vllm._C_stable_libtorch",
    "vllm._C",
    "vllm._moe_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
"""What vLLM's CUDA build has and the CPU build lacks; for a configuration it is only imported."""

SUPPORTED_FROM = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
}
"""What that build is asked of a capability, and from which one on it says yes."""

chosen: Machine | None = None
"""The GPU that is asked about; while vLLM is imported there is none."""


def fake_cuda() -> None:
    """Let vLLM see `chosen`; call it before anything else of vLLM is imported."""
    for module in COMPILED:
        sys.modules[module] = types.ModuleType(module)
    import torch
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    def machine() -> Machine:
        assert chosen, "vLLM asks for the GPU while it is imported"
        return chosen

    class Faked(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*machine().capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return machine().name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return machine().gib << 30

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
            return max(machine().parallel)

    vllm.platforms._current_platform = Faked()
    for question, least in SUPPORTED_FROM.items():
        setattr(torch.ops._C, question, least.__le__)
