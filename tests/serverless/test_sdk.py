"""The shape of the SDK that the job loop relies on, and what serves when it changes."""

import sys
from typing import Any

import pytest
from runpod.serverless.modules import rp_http, rp_scale

from tests.support import endpoint
from worker.serverless import sdk as stock_loop

CODE = "import os\n\ndef "


def test_the_installed_sdk_is_the_one_that_the_job_loop_was_written_for() -> None:
    assert stock_loop.sdk_problem() is None


@pytest.mark.parametrize(
    ("owner", "name", "value", "sentence"),
    [
        (rp_scale, "JobScaler", None, "runpod.serverless.modules.rp_scale.JobScaler is missing"),
        (rp_scale.JobScaler, "stop_job", lambda self: None, "stop_job takes ('self',), not"),
        (rp_scale, "get_job", lambda session: None, "get_job takes ('session',), not"),
        (rp_http, "JOB_DONE_URL", None, "rp_http.JOB_DONE_URL is missing"),
        (stock_loop, "SDK_ATTRIBUTES", ("jobs",), "a JobScaler has no jobs"),
    ],
)
def test_an_sdk_of_another_shape_is_told(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any, sentence: str
) -> None:
    monkeypatch.setattr(owner, name, value)
    assert sentence in (stock_loop.sdk_problem() or "")


def test_the_sdks_own_loop_serves_when_the_sdk_is_unknown() -> None:
    with endpoint(
        command=[sys.executable, "-m", "tests.stock_worker"], CONCURRENCY_MODIFIER="4"
    ) as served:
        assert served.output.find("the SDK's own loop serves instead")
        assert served.output.find("a JobScaler has no something_new")
        options = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
        jobs = [
            served.run({"prompt": CODE, "answerType": kind, "options": options})
            for kind in ("normal", "stream") * 4
        ]
        outputs = [served.finished(job)["output"] for job in jobs]
        assert len({"".join(chunk["text"] for chunk in output) for output in outputs}) == 1
        assert served.error({"prompt": ""}).startswith('prompt: "" is not allowed')
