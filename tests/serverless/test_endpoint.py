"""The worker as its clients see it: through the emulator, with the real SDK on both ends."""

import concurrent.futures
import json

import pytest
import runpod

from tests.support import Endpoint, eventually

pytestmark = pytest.mark.engine

CODE = "import os\n\ndef "
GREEDY = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture
def sdk(local: Endpoint, monkeypatch: pytest.MonkeyPatch) -> runpod.Endpoint:
    """runpod's own client."""
    monkeypatch.setattr(runpod, "endpoint_url_base", local.url.rsplit("/", 1)[0])
    monkeypatch.setattr(runpod, "api_key", "test")
    return runpod.Endpoint("local")


def test_normal(local: Endpoint) -> None:
    status = local.runsync({"prompt": CODE, "answerType": "normal", "options": GREEDY})
    assert status["status"] == "COMPLETED"
    [answer] = status["output"]
    assert answer["text"]
    assert answer["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 48
    assert usage["total_tokens"] == usage["prompt_tokens"] + 48


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7}])
def test_the_joined_stream_is_the_normal_answer(local: Endpoint, sampling: dict) -> None:
    options = GREEDY | sampling
    normal = local.text({"prompt": CODE, "options": options})
    chunks = list(
        local.stream(local.run({"prompt": CODE, "answerType": "stream", "options": options}))
    )
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == normal
    assert [chunk for chunk in chunks if "finish_reason" in chunk] == chunks[-1:]
    assert chunks[-1]["usage"]["completion_tokens"] == 48


def test_characters_of_several_bytes_are_never_split(local: Endpoint) -> None:
    text = "héllo 日本語 🎉 ẞß — "
    forced = {"type": "json_schema", "json_schema": {"schema": {"const": text}}}
    options = {"response_format": forced, "max_tokens": 200, "temperature": 0}
    chunks = list(
        local.stream(local.run({"prompt": "x", "answerType": "stream", "options": options}))
    )
    assert len(chunks) > 1
    assert json.loads("".join(chunk["text"] for chunk in chunks)) == text
    assert not any("\ufffd" in chunk["text"] for chunk in chunks)


def test_messages_go_through_the_chat_template(local: Endpoint) -> None:
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    status = local.runsync({"messages": messages, "options": {"temperature": 0}})
    [answer] = status["output"]
    assert answer["text"].strip()
    assert answer["usage"]["prompt_tokens"] > 5
    streamed = local.stream(
        local.run({"messages": messages, "answerType": "stream", "options": {"temperature": 0}})
    )
    assert "".join(chunk["text"] for chunk in streamed) == answer["text"]


def test_several_answers_to_one_prompt(local: Endpoint) -> None:
    options = {"n": 3, "max_tokens": 8, "ignore_eos": True, "seed": 3}
    answers = local.runsync({"prompt": CODE, "options": options})["output"]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert all(answer["finish_reason"] == "length" for answer in answers)
    assert [a["usage"]["completion_tokens"] for a in answers if "usage" in a] == [24]
    chunks = list(
        local.stream(local.run({"prompt": CODE, "answerType": "stream", "options": options}))
    )
    for index, answer in enumerate(answers):
        text = "".join(chunk["text"] for chunk in chunks if chunk["index"] == index)
        assert text == answer["text"]
    assert "usage" in chunks[-1]


def test_stop_strings_and_the_old_name_of_max_tokens(local: Endpoint) -> None:
    full = local.text({"prompt": CODE, "options": GREEDY})
    stop = full[10:14]
    [answer] = local.runsync({"prompt": CODE, "options": GREEDY | {"stop": stop}})["output"]
    assert answer["text"] == full[: full.index(stop)]
    assert answer["finish_reason"] == "stop"
    options = {"max_new_tokens": 3, "ignore_eos": True}
    [answer] = local.runsync({"prompt": CODE, "options": options})["output"]
    assert answer["usage"]["completion_tokens"] == 3


def test_the_answer_fills_no_more_than_the_context(local: Endpoint) -> None:
    sentence = local.error({"prompt": CODE, "options": {"max_tokens": 10**6}})
    assert sentence.startswith("options.max_tokens: 1000000 is not allowed; it must be at most ")
    room = int(sentence.split("at most ")[1].split(",")[0])
    options = {"max_tokens": room, "ignore_eos": True}
    [answer] = local.runsync({"prompt": CODE, "options": options})["output"]
    assert answer["usage"]["completion_tokens"] == room


@pytest.mark.parametrize(
    ("job_input", "sentence"),
    [
        ({"prompt": ""}, 'prompt: "" is not allowed'),
        ({}, "either prompt or messages"),
        ([], "must be an object, not a list"),
        ({"prompt": "x", "answerType": "quick"}, "'normal' or 'stream'"),
        ({"prompt": "word " * 1_000_000}, "prompt: "),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages: "),
        ({"prompt": "x", "options": {"temperature": -1}}, "options.temperature: -1 is not allowed"),
        ({"prompt": "x", "options": {"logit_bias": {"a": 1}}}, "must be a token id"),
        ({"prompt": "x", "options": {"logit_bias": {"99999999": 1}}}, "options"),
        ({"prompt": "x", "options": {"allowed_token_ids": [99999999]}}, "options"),
        ({"prompt": "x", "options": {"stop_token_ids": [99999999]}}, "options"),
        ({"messages": [{"role": "user", "content": [{"type": "nope"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
    ids=range(13),
)
def test_bad_input_is_one_sentence_and_harms_nothing(
    local: Endpoint, job_input: object, sentence: str
) -> None:
    other = local.run({"prompt": CODE, "options": {"max_tokens": 200, "ignore_eos": True}})
    error = local.error(job_input)
    assert sentence in error
    assert "\n" not in error
    assert len(error) < 400
    assert local.finished(other)["status"] == "COMPLETED"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "(((("},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
    ],
    ids=["type", "reference", "pattern", "recursion"],
)
def test_no_schema_ends_the_engine(local: Endpoint, schema: dict) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    options = {"response_format": wanted, "max_tokens": 5}
    status = local.runsync({"prompt": "x", "options": options})
    assert status["status"] in {"COMPLETED", "FAILED"}
    assert local.text({"prompt": CODE, "options": {"max_tokens": 2}}) is not None
    assert [worker["restarts"] for worker in local.workers()] == [0]


def test_64_jobs_at_once_all_complete(local: Endpoint) -> None:
    options = {"max_tokens": 64, "ignore_eos": True}
    kinds = ["normal", "stream"]
    jobs = [
        local.run({"prompt": f"{CODE}f{i}", "answerType": kinds[i % 2], "options": options})
        for i in range(64)
    ]
    for job in jobs:
        status = local.finished(job)
        assert status["status"] == "COMPLETED", status
        assert status["output"][-1]["usage"]["completion_tokens"] == 64


def test_runpods_client(sdk: runpod.Endpoint) -> None:
    job_input = {"prompt": CODE, "options": {"max_tokens": 16, "ignore_eos": True}}
    assert sdk.run_sync({"input": job_input}, timeout=60)[0]["text"]

    job = sdk.run({"input": job_input | {"answerType": "stream"}})
    chunks = list(job.stream())
    assert chunks[-1]["finish_reason"] == "length"
    assert job.status() == "COMPLETED"
    assert job.output(timeout=10) == chunks

    long = job_input | {"answerType": "stream", "options": {"max_tokens": 1900, "ignore_eos": True}}
    job = sdk.run({"input": long})
    eventually(lambda: job.status() == "IN_PROGRESS", 30, "the job's start")
    job.cancel()
    eventually(lambda: job.status() == "CANCELLED", 10, "the cancelled status")
    assert sdk.health()["workers"]
    assert sdk.purge_queue()


def test_a_cancelled_job_frees_its_slot_for_others(local: Endpoint) -> None:
    options = {"max_tokens": 1900, "ignore_eos": True}
    job = local.run({"prompt": CODE, "answerType": "stream", "options": options})
    eventually(lambda: local.status(job)["status"] == "IN_PROGRESS", 30, "the job's start")
    local.http.post(f"/cancel/{job}")
    assert local.finished(job)["status"] == "CANCELLED"
    eventually(lambda: local.output.find(f"{job} | ⊘ cancelled"), 10, "the worker's log line")
    eventually(lambda: not local.workers()[0]["jobs_in_progress"], 10, "the worker without a job")


def test_one_line_is_logged_for_each_outcome(local: Endpoint) -> None:
    fine = local.run({"prompt": CODE, "options": {"max_tokens": 2, "ignore_eos": True}})
    bad = local.run({"prompt": 1})
    local.finished(fine)
    local.finished(bad)
    eventually(lambda: local.output.find(f"{fine} | ✓ finished after "), 10, "the log line")
    eventually(lambda: local.output.find(f"{bad} | ✗ failed: prompt: 1 is not"), 10, "the log line")
    for job in (fine, bad):
        assert sum(job in line for line in local.output.lines) == 1


def test_the_start_is_reported_phase_by_phase(local: Endpoint) -> None:
    line = local.output.find("ready after ")
    assert line
    for phase in ("imports", "weights", "engine", "warm-up"):
        assert f"{phase} " in line
    assert local.output.find("weights: ")
    assert local.output.find("max_model_len is ")
    assert local.output.find("taking jobs, 64 at once")


def test_fifty_clients_that_hang_up(local: Endpoint) -> None:
    options = {"max_tokens": 400, "ignore_eos": True}

    def submit_and_cancel(i: int) -> str:
        job = local.run({"prompt": f"{CODE}{i}", "answerType": "stream", "options": options})
        next(local.stream(job), None)
        local.http.post(f"/cancel/{job}")
        return job

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        jobs = list(pool.map(submit_and_cancel, range(50)))
    assert {local.finished(job)["status"] for job in jobs} <= {"CANCELLED", "COMPLETED"}
    assert local.text({"prompt": CODE, "options": {"max_tokens": 2}}) is not None
