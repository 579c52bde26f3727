"""Whether the installed SDK is one that JobLoop was written for."""

from __future__ import annotations

import inspect
from typing import Any

from runpod.serverless import worker as rp_worker
from runpod.serverless.modules import rp_http, rp_scale

SDK_SHAPE: dict[tuple[Any, str], tuple[str, ...]] = {
    (rp_scale, "JobScaler"): ("config",),
    (rp_scale.JobScaler, "start"): ("self",),
    (rp_scale.JobScaler, "run"): ("self",),
    (rp_scale.JobScaler, "get_jobs"): ("self", "session"),
    (rp_scale.JobScaler, "monitor_stop_signals"): ("self", "session"),
    (rp_scale.JobScaler, "handle_shutdown"): ("self", "signum", "frame"),
    (rp_scale.JobScaler, "stop_job"): ("self", "job_id"),
    (rp_scale.JobScaler, "kill_worker"): ("self",),
    (rp_scale.JobScaler, "is_alive"): ("self",),
    (rp_scale, "get_job"): ("session", "num_jobs"),
    (rp_scale, "get_stop_signals"): ("session",),
}
"""What of the SDK JobLoop calls or overrides, with the parameters that it relies on."""

SDK_ATTRIBUTES = (
    "_shutdown_event",
    "config",
    "current_concurrency",
    "job_progress",
    "jobs_fetcher",
    "jobs_fetcher_timeout",
    "jobs_tasks",
    "stop_signals_fetcher",
    "stop_signals_fetcher_timeout",
)
"""What a JobScaler has."""


def sdk_problem() -> str | None:
    """How the installed SDK differs from the one that JobLoop was written for, or None."""
    for (owner, name), wanted in SDK_SHAPE.items():
        found = getattr(owner, name, None)
        if found is None:
            return f"{owner.__name__}.{name} is missing"
        if (parameters := tuple(inspect.signature(found).parameters)) != wanted:
            return f"{owner.__name__}.{name} takes {parameters}, not {wanted}"
    scaler = rp_scale.JobScaler({"handler": None})
    for name in SDK_ATTRIBUTES:
        if not hasattr(scaler, name):
            return f"a JobScaler has no {name}"
    for name in ("JOB_DONE_URL", "JOB_STREAM_URL"):
        if not isinstance(getattr(rp_http, name, None), str):
            return f"{rp_http.__name__}.{name} is missing"
    if getattr(rp_worker, "rp_scale", None) is not rp_scale:
        return f"{rp_worker.__name__} does not take its JobScaler from {rp_scale.__name__}"
    return None
