"""MODE_TO_RUN=serverless: the runpod SDK with our job loop in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import runpod
from runpod.serverless.modules import rp_scale

from worker import loading
from worker.errors import UnknownSdk
from worker.serverless import sdk
from worker.serverless.loop import JobLoop
from worker.settings import Settings


def serve(settings: Settings, environment: Mapping[str, str]) -> int:
    """Take and answer jobs until SIGTERM (returns 0) or until the engine is dead (returns 1).

    Raises:
        SettingsError: HANDLER does not load.
        UnknownSdk: the installed SDK is another than the job loop was written for.
    """
    handler = loading.load(settings.handler)
    if problem := sdk.sdk_problem():
        raise UnknownSdk(
            f"runpod {runpod.__version__} is not what Tripod's job loop was written for: "
            f"{problem}; install the version in requirements/image.in"
        )
    loops: list[JobLoop] = []

    def create(config: dict[str, Any]) -> JobLoop:
        loops.append(JobLoop(config, settings, handler))
        return loops[0]

    rp_scale.JobScaler = create
    runpod.serverless.start({"handler": handler.answer, "return_aggregate_stream": True})
    return loops[0].exit_code
