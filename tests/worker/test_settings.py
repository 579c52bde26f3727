"""The environment: what is read, and how what is wrong is told."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT
from worker.configuration import load
from worker.settings import Settings

QUEUE = {"MODE_TO_RUN": "serverless", "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1/job-take/$ID?"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    from worker.errors import SettingsError

    for name, value in (QUEUE | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load(os.environ)
    return caught.value.problems


def test_defaults_are_the_contract() -> None:
    expected = {
        "mode_to_run": "pod",
        "model": "mistralai/Mistral-7B-Instruct-v0.1",
        "concurrency_modifier": 1,
        "max_model_len": 25000,
        "engine": "auto",
        "engine_args": {},
        "startup_timeout": 1200,
        "job_timeout": 600,
        "shutdown_timeout": 30,
    }
    for name, default in expected.items():
        assert Settings.model_fields[name].default == default


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = QUEUE | {
        "MODEL": "org/name@v1",
        "CONCURRENCY_MODIFIER": "auto",
        "MAX_MODEL_LEN": "2048",
        "ENGINE": "vllm",
        "ENGINE_ARGS": '{"max-num-seqs": 8}',
        "JOB_TIMEOUT": "1.5",
        "HF_TOKEN": "hf_secret",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load(os.environ)
    assert settings.model == "org/name@v1"
    assert settings.concurrency_modifier == "auto"
    assert settings.max_model_len == 2048
    assert settings.engine_args == {"max-num-seqs": 8}
    assert settings.job_timeout == 1.5
    assert "hf_secret" not in repr(settings)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (QUEUE | {"MAX_MODEL_LEN": "", "HF_TOKEN": ""}).items():
        monkeypatch.setenv(name, value)
    assert load(os.environ).max_model_len == 25000
    assert load(os.environ).hf_token is None


def test_worker_vllms_names_are_read_and_win(monkeypatch: pytest.MonkeyPatch) -> None:
    given = QUEUE | {
        "MODEL": "org/ours",
        "MODEL_NAME": "org/theirs",
        "CONCURRENCY_MODIFIER": "1",
        "MAX_CONCURRENCY": "30",
        "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "gpt",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load(os.environ)
    assert settings.model == "org/theirs"
    assert settings.concurrency_modifier == 30
    assert settings.served_model_name == "gpt"


def test_a_problem_names_the_variable_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, MAX_CONCURRENCY="many")
    assert problem.startswith("MAX_CONCURRENCY=many: must be a whole number")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MODE_TO_RUN", "Serverles", "must be 'serverless', 'pod', 'both', 'api' or 'rpc'"),
        ("RPC_PORT", "0", "greater than or equal to 1"),
        ("RPC_HOST", "localhost", "valid IPv4 address"),
        ("RPC_BACKENDS", "a:1,b", "must be host:port,host:port,…; b is no host:port"),
        ("RPC_BACKENDS", "a:1,,a:65536", "an empty entry is no host:port; a:65536 is no host:port"),
        ("RPC_BACKENDS", "a:1, a:1", "a:1 stands there twice"),
        ("RPC_BACKENDS", "a:1", "only a GGUF can be shared, and MODEL=mistralai/"),
        ("CONCURRENCY_MODIFIER", "0", "a whole number from 1 to 4096"),
        ("CONCURRENCY_MODIFIER", "many", "a whole number from 1 to 4096, or auto"),
        ("MAX_MODEL_LEN", "1.5", "integer"),
        ("MAX_MODEL_LEN", "-3", "greater than or equal to 1"),
        ("ENGINE", "vlm", "must be 'auto', 'vllm'"),
        ("ENGINE_URL", "http://127.0.0.1:8000", "only ENGINE=remote"),
        ("ENGINE_ARGS", "{", "must be a JSON object"),
        ("ENGINE_ARGS", "[]", "must be a JSON object"),
        ("ENGINE_ARGS", '{"max_num_seq": 1}', "did you mean max_num_seqs?"),
        ("ENGINE_ARGS", '{"max_model_len": 1}', "is set by MAX_MODEL_LEN"),
        ("JOB_TIMEOUT", "0", "greater than 0"),
        ("JOB_TIMEOUT", "nan", "a finite number"),
        ("MODEL", "not a model", "a hub id"),
        ("MODEL", "openllm:llama 3", "must be openllm:<tag>"),
        ("MODEL", "org/name:Q4 K M", "one GGUF file of a hub repository"),
    ],
)
def test_a_problem_names_variable_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    [problem] = problems(monkeypatch, **{name: value})
    assert problem.startswith(f"{name}=")
    assert value in problem
    assert allowed in problem


def test_backends_are_for_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"MODEL": "/x/file.gguf", "RPC_BACKENDS": "10.0.0.2:50052, gpu-2.internal:50053"}
    for name, value in (QUEUE | shared).items():
        monkeypatch.setenv(name, value)
    assert load(os.environ).rpc_backends == ("10.0.0.2:50052", "gpu-2.internal:50053")
    [problem] = problems(monkeypatch, ENGINE="vllm")
    assert problem.startswith("RPC_BACKENDS=10.0.0.2:50052, gpu-2")
    assert problem.endswith(": only llama.cpp shares a model, and ENGINE=vllm")


def test_a_remote_engine_needs_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, ENGINE="remote")
    assert problem == "ENGINE_URL: ENGINE=remote needs the base URL of its server"


@pytest.mark.parametrize("url", ["10.0.0.7:8000", "ftp://a", "http://", "http://a/v1?key=b"])
def test_a_url_that_is_none(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    [problem] = problems(monkeypatch, ENGINE="remote", ENGINE_URL=url)
    assert problem == f"ENGINE_URL={url}: must be a base URL such as http://10.0.0.7:8000"


def test_a_password_in_a_url_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, ENGINE="remote", ENGINE_URL="http://me:secret@a:8000")
    assert problem == (
        "ENGINE_URL=http://…@a:8000: must hold no password; ENGINE_API_KEY is for a key"
    )


def test_a_queue_is_needed_for_serverless(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, RUNPOD_WEBHOOK_GET_JOB="")
    assert problem.startswith("RUNPOD_WEBHOOK_GET_JOB: ")
    assert "python -m emulator" in problem


def test_every_problem_is_listed_before_anything_heavy_is_imported() -> None:
    wrong = {
        "MODE_TO_RUN": "x",
        "MAX_MODEL_LEN": "x",
        "ENGINE_ARGS": '{"nope": 1}',
        "JOB_TIMEOUT": "x",
    }
    script = (
        "import os, sys; from worker import __main__, configuration, modes;"
        "code = __main__.main(lambda: modes.run(configuration.load(os.environ), {}));"
        "print(code, [m for m in ('vllm', 'torch', 'runpod', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=wrong, capture_output=True, text=True
    )
    assert ran.stdout.split("\n")[-2] == "2 []"
    assert [line.split("=")[0] for line in ran.stderr.splitlines()] == list(wrong)
    ran = subprocess.run([sys.executable, "-m", "worker"], cwd=ROOT, env=wrong, check=False)
    assert ran.returncode == 2
