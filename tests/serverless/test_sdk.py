"""The shape of the SDK that the job loop relies on, and what is said when it changes."""

import subprocess
import sys
from typing import Any

import pytest
from runpod.serverless.modules import rp_http, rp_scale

from tests.support import ROOT, worker_environment
from worker.serverless import sdk


def test_the_installed_sdk_is_the_one_that_the_job_loop_was_written_for() -> None:
    assert sdk.sdk_problem() is None


@pytest.mark.parametrize(
    ("owner", "name", "value", "sentence"),
    [
        (rp_scale, "JobScaler", None, "runpod.serverless.modules.rp_scale.JobScaler is missing"),
        (rp_scale.JobScaler, "stop_job", lambda self: None, "stop_job takes ('self',), not"),
        (rp_scale, "get_job", lambda session: None, "get_job takes ('session',), not"),
        (rp_http, "JOB_DONE_URL", None, "rp_http.JOB_DONE_URL is missing"),
        (sdk, "SDK_ATTRIBUTES", ("jobs",), "a JobScaler has no jobs"),
    ],
)
def test_an_sdk_of_another_shape_is_told(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any, sentence: str
) -> None:
    monkeypatch.setattr(owner, name, value)
    assert sentence in (sdk.sdk_problem() or "")


def test_a_worker_with_an_unknown_sdk_ends() -> None:
    changed = (
        "import os, sys; from worker import __main__, configuration, modes;"
        "from worker.serverless import sdk; sdk.SDK_ATTRIBUTES += ('something_new',);"
        "sys.exit(__main__.main(lambda: modes.run(configuration.load(os.environ), os.environ)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", changed],
        cwd=ROOT,
        env=worker_environment(RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:1/job-take/$ID?"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr
    [line] = [line for line in ran.stdout.splitlines() if "job loop was written for" in line]
    assert "a JobScaler has no something_new" in line
    assert "weights:" not in ran.stdout, "nothing is loaded before"
