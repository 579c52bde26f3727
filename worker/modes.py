"""MODE_TO_RUN → the room that runs it."""

from __future__ import annotations

from collections.abc import Mapping

from worker.settings import Settings


def run(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run the mode until it ends; returns the exit code of the process."""
    match settings.mode_to_run:
        case "serverless":
            from worker.serverless.serve import serve
        case "api":
            from worker.api.serve import serve
        case "rpc":
            from worker.rpc.serve import serve
        case "pod" | "both":
            from worker.pod.serve import serve
    return serve(settings, environment)
