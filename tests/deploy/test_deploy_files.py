"""deploy/ fits the worker: its variables, its ports, and what its /ping means.

What a probe or a health check takes for success is run for real, against a server that answers
as /ping does.
"""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.client_examples.support import stub
from tests.support import ROOT
from worker import configuration
from worker.settings import ALSO_READ, Settings

DEPLOY = ROOT / "deploy"
NOT_OURS = {"HF_HOME"}
"""Read by huggingface_hub: where downloaded weights are kept."""

PING = [(204, "starting", True), (200, "ready", False), (503, "dead", True), (0, "hangs up", True)]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The one service of compose.yaml."""
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    return service


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


def load(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The worker's settings in an environment of these variables alone."""
    assert variables.keys() - NOT_OURS <= {name.upper() for name in Settings.model_fields}
    for name in [*map(str.upper, Settings.model_fields), *ALSO_READ]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return configuration.load(os.environ)


def seconds(text: str) -> int:
    assert re.fullmatch(r"\d+s", text), text
    return int(text[:-1])


def fails(command: list[str], status: int) -> bool:
    """Whether a check's command fails while the server that it asks answers `status`."""
    with stub((status, "")) as server:
        port = server.url.split(":")[2].split("/")[0]
        here = [part.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for part in command]
        ran = subprocess.run(
            [sys.executable if part == "python3" else part for part in here],
            env={**os.environ, "PORT_HEALTH": port, "no_proxy": "127.0.0.1"},
            capture_output=True,
        )
        assert server.seen == ["GET /ping"]
        return ran.returncode != 0


def compose_environment(service: dict[str, Any], **given: str) -> dict[str, str]:
    """The environment with compose's `${NAME:-default}` and `${NAME:?message}` replaced."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        assert kind == "-" or name in given, f"{name} {rest}"
        return given.get(name) or (rest if kind == "-" else "")

    return {
        name: re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, str(text))
        for name, text in service["environment"].items()
    }


def test_compose_starts_the_api(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(compose_environment(service, API_KEY="key"), monkeypatch)
    assert loaded.mode_to_run == "api"
    assert loaded.host == "0.0.0.0"
    assert loaded.api_key
    assert loaded.api_key.get_secret_value() == "key"
    assert loaded.hf_token is None


def test_compose_asks_for_the_key_and_holds_none(service: dict[str, Any]) -> None:
    assert service["environment"]["API_KEY"].startswith("${API_KEY:?")
    assert service["environment"]["HF_TOKEN"] == "${HF_TOKEN:-}"


def test_compose_publishes_the_workers_port(service: dict[str, Any]) -> None:
    (published,) = service["ports"]
    assert published.rpartition(":")[2] == str(service["environment"]["PORT"])


def test_compose_reserves_a_gpu_and_shared_memory(service: dict[str, Any]) -> None:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["shm_size"] == "1g"


def test_compose_keeps_downloaded_weights(service: dict[str, Any]) -> None:
    assert service["volumes"] == [f"hf-cache:{service['environment']['HF_HOME']}"]


def test_compose_waits_as_long_as_the_worker(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(compose_environment(service, API_KEY="key"), monkeypatch)
    assert seconds(service["stop_grace_period"]) > loaded.shutdown_timeout
    assert seconds(service["healthcheck"]["start_period"]) >= loaded.startup_timeout


@pytest.mark.parametrize(("status", "state", "bad"), PING)
def test_composes_health_check(service: dict[str, Any], status: int, state: str, bad: bool) -> None:
    form, *command = service["healthcheck"]["test"]
    assert form == "CMD"
    assert fails(command, status) is bad, state


@pytest.fixture(scope="module")
def rpc() -> dict[str, Any]:
    """compose.rpc.yaml."""
    return yaml.safe_load((DEPLOY / "compose.rpc.yaml").read_text())


def test_compose_rpc_shares_a_gguf(rpc: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = compose_environment(rpc["services"]["main"], API_KEY="key", MODEL="org/name:Q4_K_M")
    main = load(given, monkeypatch)
    assert main.mode_to_run == "api"
    backends = {name for name in rpc["services"] if name != "main"}
    assert {backend.split(":")[0] for backend in main.rpc_backends} == backends
    assert len(backends) == 2
    for backend in main.rpc_backends:
        name, port = backend.split(":")
        lent = load(compose_environment(rpc["services"][name]), monkeypatch)
        assert (lent.mode_to_run, lent.rpc_port) == ("rpc", int(port))
        assert not lent.rpc_host.is_loopback


def test_compose_rpc_has_one_image_for_both_roles(rpc: dict[str, Any]) -> None:
    images = {service["image"] for service in rpc["services"].values()}
    assert images == {"${TRIPOD_IMAGE:-tripod:llama-cpu-unbundled}"}


def test_compose_rpc_lets_nobody_else_reach_a_backend(rpc: dict[str, Any]) -> None:
    assert rpc["networks"] == {"rpc": {"internal": True}}
    for name, service in rpc["services"].items():
        assert ("ports" in service) == (name == "main")
        assert service["networks"] == (["default", "rpc"] if name == "main" else ["rpc"])


def test_compose_rpc_publishes_mains_port_and_keeps_its_weights(rpc: dict[str, Any]) -> None:
    main = rpc["services"]["main"]
    (published,) = main["ports"]
    assert published.rpartition(":")[2] == str(main["environment"]["PORT"])
    assert main["volumes"] == [f"hf-cache:{main['environment']['HF_HOME']}"]
    assert seconds(main["stop_grace_period"]) > main["environment"]["SHUTDOWN_TIMEOUT"]


def test_kubernetes_starts_the_api(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(
        {entry["name"]: entry.get("value", "secret") for entry in container["env"]}, monkeypatch
    )
    assert loaded.mode_to_run == "api"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": loaded.port, "health": loaded.port_health}


def test_kubernetes_takes_secrets_from_the_secret(container: dict[str, Any]) -> None:
    secrets = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container["env"]
        if "valueFrom" in entry
    }
    assert secrets == {
        "API_KEY": {"name": "tripod", "key": "api-key"},
        "HF_TOKEN": {"name": "tripod", "key": "hf-token", "optional": True},
    }


def test_kubernetes_waits_as_long_as_the_worker(
    manifests: dict[str, dict[str, Any]], pod: dict[str, Any], container: dict[str, Any]
) -> None:
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(values["SHUTDOWN_TIMEOUT"])
    deadline = manifests["Deployment"]["spec"]["progressDeadlineSeconds"]
    assert deadline > float(values["STARTUP_TIMEOUT"])


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_a_worker_that_loads_its_model_is_alive(container: dict[str, Any], probe: str) -> None:
    """httpGet: 200 to 399 is success, so 204 is, and 503 is not."""
    assert container[probe]["httpGet"] == {"path": "/ping", "port": "health"}


@pytest.mark.parametrize(("status", "state", "bad"), PING)
def test_only_a_worker_that_is_ready_gets_requests(
    container: dict[str, Any], status: int, state: str, bad: bool
) -> None:
    probe = container["readinessProbe"]
    assert "httpGet" not in probe
    assert fails(probe["exec"]["command"], status) is bad, state


def test_kubernetes_gives_a_gpu_and_shared_memory(
    pod: dict[str, Any], container: dict[str, Any]
) -> None:
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    (cache,) = [entry["value"] for entry in container["env"] if entry["name"] == "HF_HOME"]
    assert mounts[cache] in volumes


def test_the_service_finds_the_pods(manifests: dict[str, dict[str, Any]]) -> None:
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
