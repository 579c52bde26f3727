"""Containers as they are run: serverless, pod and both, each with no network but its own."""

import json
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.sync.client import connect

from tests.image.conftest import MODEL
from tests.image.engine import BASE, Built, Container, Engine, eventually, network_of
from tests.support import AMPLE, Endpoint, start, stop

pytestmark = pytest.mark.timeout(900)

SHUTDOWN_TIMEOUT = 30
ENGINE = (
    *("--shm-size", "1g"),
    *("--env", f"SHUTDOWN_TIMEOUT={SHUTDOWN_TIMEOUT}"),
    *("--env", f"ENGINE_ARGS={json.dumps({'kv_cache_memory_bytes': 256 << 20})}"),
)
JUPYTER = "http://127.0.0.1:8888"


@dataclass(frozen=True)
class Island:
    """A network with nothing in it but an emulator, and what a worker needs to join it."""

    endpoint: Endpoint
    pid: int
    options: tuple[str, ...]


@pytest.fixture
def island(engine: Engine) -> Iterator[Island]:
    hold = ("sleep", "infinity")
    with engine.container(BASE, "--network", "none", command=hold) as holder, on(holder):
        command = [sys.executable, "-m", "emulator", "--port", "8008", "--workers", "0"]
        process, output = start(command, engine.environment)
        try:
            eventually(lambda: output.find("ready: "), 60, output.text)
            exports = [shlex.split(line) for line in output.lines if line.startswith("export ")]
            variables = [option for _, value in exports for option in ("--env", value)]
            network = ("--network", f"container:{holder.name}")
            endpoint = Endpoint(process, output, output.find("ready: ").split()[-1])
            yield Island(endpoint, holder.pid, (*network, *variables))
            endpoint.http.close()
        finally:
            stop(process)


@contextmanager
def on(container: Container) -> Iterator[None]:
    """Go on inside the network of this container."""
    with network_of(container.pid):
        yield


# ---- ssh


@dataclass(frozen=True)
class Keys:
    """Two keys of a client; the pod knows one of them."""

    right: Path
    wrong: Path

    @property
    def public(self) -> tuple[str, str]:
        return "--env", f"PUBLIC_KEY={Path(f'{self.right}.pub').read_text(encoding='utf-8')}"


@pytest.fixture(scope="session")
def keys(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    pair = Keys(folder / "right", folder / "wrong")
    for key in (pair.right, pair.wrong):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return pair


def client(program: str, key: Path | None, *arguments: str) -> list[str]:
    """An ssh or scp command that uses nothing of this machine's own configuration."""
    identity = ["-i", str(key)] if key else ["-o", "PubkeyAuthentication=no"]
    options = {
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    chosen = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return [program, "-F", "/dev/null", *identity, *chosen, *arguments]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def ssh(key: Path | None, command: str) -> subprocess.CompletedProcess[str]:
    return run(client("ssh", key, "root@127.0.0.1", command))


def ssh_answers(keys: Keys, container: Container) -> None:
    eventually(lambda: ssh(keys.right, "true").returncode == 0, 60, container.text)


# ---- JupyterLab


def status(path: str, token: str | None = None) -> int | None:
    """The status that JupyterLab answers with, None while it does not listen."""
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        return httpx.get(f"{JUPYTER}{path}", headers=headers, timeout=30).status_code
    except httpx.TransportError:
        return None


def computed(token: str, code: str) -> str:
    """What a kernel prints that is started for this and then ended."""
    headers = {"Authorization": f"token {token}"}
    with httpx.Client(base_url=JUPYTER, headers=headers, timeout=60) as jupyter:
        kernel = jupyter.post("/api/kernels", json={"name": "python3"}).raise_for_status().json()
        path = f"/api/kernels/{kernel['id']}"
        message = {
            "header": {
                "msg_id": uuid.uuid4().hex,
                "msg_type": "execute_request",
                "session": uuid.uuid4().hex,
                "username": "test",
                "version": "5.3",
            },
            "parent_header": {},
            "metadata": {},
            "content": {"code": code, "silent": False},
            "channel": "shell",
        }
        channels = f"{JUPYTER.replace('http', 'ws', 1)}{path}/channels"
        with connect(channels, additional_headers=headers, proxy=None) as socket:
            socket.send(json.dumps(message))
            printed = ""
            while True:
                answer = json.loads(socket.recv(timeout=120))
                if answer["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                    continue
                if answer["msg_type"] == "stream":
                    printed += answer["content"]["text"]
                elif answer["msg_type"] == "error":
                    pytest.fail("\n".join(answer["content"]["traceback"]))
                elif answer["content"].get("execution_state") == "idle":
                    break
        jupyter.delete(path).raise_for_status()
    return printed


# ---- processes, seen from this machine


def processes(container: Container, text: str = "") -> list[psutil.Process]:
    """The container's processes whose command line holds `text`."""
    family = psutil.Process(container.pid).children(recursive=True)
    return [process for process in family if text in " ".join(command_line(process))]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [process.name()]
    except psutil.NoSuchProcess:
        return []


def leaves_no_zombie(container: Container) -> None:
    def zombies() -> list[psutil.Process]:
        found = []
        for process in psutil.Process(container.pid).children(recursive=True):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    eventually(lambda: not zombies(), 30, lambda: f"no zombie among {zombies()}")


# ---- the three legs

MANY = 40
"""Jobs that keep a worker busy for minutes, so that some run whenever a test looks."""


def job(tokens: int) -> dict[str, Any]:
    options = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return {"prompt": "import os\n\ndef ", "answerType": "normal", "options": options}


def statuses(endpoint: Endpoint, jobs: list[str]) -> list[str]:
    return [endpoint.http.get(f"/status/{job_id}").json()["status"] for job_id in jobs]


def those(endpoint: Endpoint, jobs: list[str], status: str) -> list[str]:
    """The jobs that have this status."""
    shown = zip(jobs, statuses(endpoint, jobs), strict=True)
    return [job_id for job_id, found in shown if found == status]


def some_run(endpoint: Endpoint, jobs: list[str], container: Container) -> list[str]:
    """Those that run, waited for: between two jobs there may be none for a moment."""
    return eventually(lambda: those(endpoint, jobs, "IN_PROGRESS"), 60, container.text)


def finished(endpoint: Endpoint, job_id: str) -> dict[str, Any]:
    def final() -> dict[str, Any] | None:
        answer = endpoint.http.get(f"/status/{job_id}").json()
        return None if answer["status"] in {"IN_QUEUE", "IN_PROGRESS"} else answer

    return eventually(final, 240, lambda: f"{job_id} ends")


def test_serverless(engine: Engine, iteration: Built, island: Island) -> None:
    """Jobs from baked weights, no network but the emulator, and SIGTERM with jobs in flight."""
    settings = ("--env", "MODE_TO_RUN=serverless", "--env", "CONCURRENCY_MODIFIER=3")
    ample = ("--env", f"SHUTDOWN_TIMEOUT={AMPLE}")  # the jobs shall end by themselves
    endpoint = island.endpoint
    with engine.container(iteration.image, *island.options, *settings, *ENGINE, *ample) as worker:
        worker.says("taking jobs")
        assert worker.find("/models/tripod--tiny")
        answer = endpoint.runsync(job(16))
        assert answer["status"] == "COMPLETED", answer
        assert answer["output"][-1]["usage"]["completion_tokens"] == 16

        jobs = [endpoint.run(job(1800)) for _ in range(MANY)]
        some_run(endpoint, jobs, worker)
        code, seconds = worker.stop(int(AMPLE))
        assert code == 0, worker.text()
        assert re.search(r"told to stop; [123] jobs are running", worker.text()), worker.text()
        engine.figures["SIGTERM with jobs in flight to exit 0"] = f"{seconds:.1f} s"
        ended = [
            finished(endpoint, job_id)
            for job_id, status in zip(jobs, statuses(endpoint, jobs), strict=True)
            if status != "IN_QUEUE"
        ]
        assert ended
        for answer in ended:
            assert answer["status"] == "COMPLETED", answer
            assert answer["output"][-1]["usage"]["completion_tokens"] == 1800


def test_llama_cpp_alone_and_shared_with_a_backend(
    engine: Engine, llama: Built, island: Island
) -> None:
    """One image in both roles: it lends itself, and it answers jobs with what is lent to it."""
    settings = ("--env", "MODE_TO_RUN=serverless", "--env", "CONCURRENCY_MODIFIER=2")
    endpoint = island.endpoint
    greedy = {"prompt": "import os\n\ndef ", "options": {"max_tokens": 24, "temperature": 0}}
    with engine.container(llama.image, *island.options, *settings) as worker:
        worker.says("taking jobs")
        assert worker.find("/models/tripod--tiny-gguf")
        alone = endpoint.runsync(greedy)
        assert alone["status"] == "COMPLETED", alone
        code, seconds = worker.stop(SHUTDOWN_TIMEOUT)
        assert code == 0, worker.text()
        engine.figures["SIGTERM to exit 0 of llama.cpp"] = f"{seconds:.1f} s"

    lends = ("--env", "MODE_TO_RUN=rpc")
    shares = ("--env", "RPC_BACKENDS=127.0.0.1:50052")
    with (
        engine.container(llama.image, *island.options, *lends) as backend,
        engine.container(llama.image, *island.options, *settings, *shares) as worker,
    ):
        backend.says("private networks only")
        worker.says("taking jobs")
        assert worker.find("127.0.0.1:50052")
        assert endpoint.runsync(greedy)["output"][0]["text"] == alone["output"][0]["text"]
        assert worker.stop(SHUTDOWN_TIMEOUT)[0] == 0, worker.text()
        assert backend.stop(SHUTDOWN_TIMEOUT)[0] == 0, backend.text()


def test_pod(engine: Engine, bundled: Built, iteration: Built, keys: Keys, tmp_path: Path) -> None:
    """ssh, scp, `python -m worker try` with an edit while the engine stays loaded, JupyterLab."""
    described = engine.inspect(bundled.image)
    _, *healthcheck = (described.get("Healthcheck") or described["Config"]["Healthcheck"])["Test"]
    token = f"jupyter-{uuid.uuid4().hex}"
    settings = (*keys.public, "--env", f"JUPYTER_PASSWORD={token}", "--network", "none")
    with engine.container(iteration.image, *settings, *ENGINE) as pod, on(pod):
        ssh_answers(keys, pod)
        session = ssh(keys.right, "env; pwd").stdout
        assert f"MODEL={MODEL}" in session
        assert token not in session
        refused = ssh(keys.wrong, "true")
        assert refused.returncode == 255
        assert "Permission denied" in refused.stderr
        # sshd names what it would accept: passwords are not among it.
        without_key = ssh(None, "true")
        assert without_key.returncode == 255
        assert "(publickey)" in without_key.stderr

        tries_a_prompt(keys)
        handler = tmp_path / "handler.py"
        copied = run(
            client("scp", keys.right, "root@127.0.0.1:/tripod/worker/handler.py", str(handler))
        )
        assert copied.returncode == 0, copied.stderr
        assert "edited in the pod" in handler.read_text(encoding="utf-8")

        eventually(lambda: status("/api") is not None, 60, pod.text)
        assert status("/api/kernels") == 403
        assert status("/api/kernels", "wrong") == 403
        assert status("/lab") in {302, 403}
        assert status("/api/kernels", token) == 200
        assert computed(token, "import worker; print(6 * 7)").strip() == "42"
        assert engine("exec", pod.name, *healthcheck) == ""

        leaves_no_zombie(pod)
        assert token not in pod.text()
        code, seconds = pod.stop(SHUTDOWN_TIMEOUT)
        assert code == 0, pod.text()
        engine.figures["SIGTERM to exit 0 of a pod"] = f"{seconds:.1f} s"


def trying_over_ssh(keys: Keys, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        client("ssh", keys.right, "root@127.0.0.1", command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tries_a_prompt(keys: Keys) -> None:
    """One job, an edit of the handler, another job: the engine is loaded once."""
    command = 'python3 -m worker try --reload --options \'{"max_tokens": 8}\' "def "'
    with trying_over_ssh(keys, command) as trying:
        assert trying.stdin
        assert trying.stdout
        assert '"text"' in until(trying, '"finish_reason"')
        edit = "import sys; print('edited in the pod', file=sys.stderr)"
        path = "/tripod/worker/handler.py"
        assert ssh(keys.right, f"echo {shlex.quote(edit)} >> {path}").returncode == 0
        trying.stdin.write("\n")
        trying.stdin.flush()
        until(trying, "edited in the pod")
        until(trying, '"finish_reason"')
        trying.stdin.close()
        rest = trying.stdout.read()
        assert trying.wait(60) == 0, rest


def until(process: subprocess.Popen[str], text: str) -> str:
    """Read what the process writes up to the line with `text`, which is returned."""
    assert process.stdout
    read = []
    for line in process.stdout:
        read.append(line)
        if text in line:
            return line
    pytest.fail(f"ended without {text!r}:\n{''.join(read)}")


def test_a_handler_on_the_volume_outlives_the_pod(
    engine: Engine, iteration: Built, keys: Keys, tmp_path: Path
) -> None:
    """Written through JupyterLab, tried and edited over ssh, and still there in the next pod."""
    token = f"jupyter-{uuid.uuid4().hex}"
    settings = (*keys.public, "--env", f"JUPYTER_PASSWORD={token}", "--network", "none")
    volume = ("--volume", f"{tmp_path}:/workspace")
    command = (
        "HANDLER=/workspace/my_handler python3 -m worker try --reload"
        """ --input '{"text": "Hello"}'"""
    )
    code = "async def handler(job, engine):\n    yield {'heard': job['input']['text']}\n"
    with engine.container(iteration.image, *settings, *volume, *ENGINE) as pod, on(pod):
        eventually(lambda: status("/api/kernels", token) == 200, 60, pod.text)
        headers = {"Authorization": f"token {token}"}
        for path, body in (
            ("my_handler", {"type": "directory"}),
            ("my_handler/handler.py", {"type": "file", "format": "text", "content": code}),
        ):
            url = f"{JUPYTER}/api/contents/{path}"
            assert httpx.put(url, json=body, headers=headers, timeout=30).status_code == 201
        ssh_answers(keys, pod)
        with trying_over_ssh(keys, command) as trying:
            until(trying, '{"heard": "Hello"}')
            edited = code.replace("heard", "understood")
            (tmp_path / "my_handler" / "handler.py").write_text(edited, encoding="utf-8")
            trying.stdin.write("\n")
            trying.stdin.flush()
            until(trying, '{"understood": "Hello"}')
            trying.stdin.close()
            rest = trying.stdout.read()
            assert trying.wait(60) == 0, rest
        assert pod.stop(SHUTDOWN_TIMEOUT)[0] == 0, pod.text()
    with engine.container(iteration.image, *settings, *volume, *ENGINE) as pod, on(pod):
        ssh_answers(keys, pod)
        assert ssh(keys.right, "cat /workspace/my_handler/handler.py").stdout == edited
        assert pod.stop(SHUTDOWN_TIMEOUT)[0] == 0, pod.text()


def test_pod_without_a_key(engine: Engine, iteration: Built) -> None:
    """The pod starts and says that ssh is off; JupyterLab makes a token and prints it once."""
    with engine.container(iteration.image, "--network", "none") as pod, on(pod):
        assert "PUBLIC_KEY" in pod.says("ssh is off")
        token = pod.says("the token is").split()[-1]
        eventually(lambda: status("/api/kernels", token) == 200, 60, pod.text)
        assert status("/api/kernels") == 403
        assert pod.text().count(token) == 1
        code, _ = pod.stop(SHUTDOWN_TIMEOUT)
        assert code == 0, pod.text()


def test_both(engine: Engine, iteration: Built, island: Island, keys: Keys) -> None:
    """A job completes while ssh and JupyterLab answer, and without JupyterLab too."""
    token = f"jupyter-{uuid.uuid4().hex}"
    settings = ("--env", "MODE_TO_RUN=both", *keys.public, "--env", f"JUPYTER_PASSWORD={token}")
    endpoint = island.endpoint
    with engine.container(iteration.image, *island.options, *settings, *ENGINE) as worker:
        worker.says("taking jobs")
        eventually(lambda: status("/api/kernels", token) == 200, 60, worker.text)
        ssh_answers(keys, worker)

        jobs = [endpoint.run(job(1800)) for _ in range(MANY)]
        some_run(endpoint, jobs, worker)
        assert ssh(keys.right, "echo here").stdout == "here\n"
        assert status("/api/kernels", token) == 200
        some_run(endpoint, jobs, worker)
        for process in processes(worker, "jupyterlab"):
            process.kill()
        eventually(lambda: status("/api/kernels", token) is None, 30, worker.text)
        for job_id in some_run(endpoint, jobs, worker):
            answer = finished(endpoint, job_id)
            assert answer["status"] == "COMPLETED", answer
        eventually(lambda: status("/api/kernels", token) == 200, 60, worker.text)
        leaves_no_zombie(worker)

        some_run(endpoint, jobs, worker)
        for core in processes(worker, "VLLM::EngineCore"):
            core.kill()
        assert worker.wait() == 1, worker.text()
        assert not those(endpoint, jobs, "IN_PROGRESS")
        [failed] = those(endpoint, jobs, "FAILED")
        assert "engine died" in finished(endpoint, failed)["error"]
