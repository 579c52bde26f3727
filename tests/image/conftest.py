"""The images under test: built once for the run, from a hub that demands a token."""

import functools
import http.server
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.image.engine import BASE, CACHE, LLAMA, ROOT, Built, Engine
from tests.preload.hub import Hub, Running

MODEL = "tripod/tiny"
GGUF = "tripod/tiny-gguf:tiny-f32.gguf"
BUNDLED = "localhost/tripod-test/bundled"
ITERATION = "localhost/tripod-test/iteration"
RUN: list[Engine] = []
"""The engine of this run, for the figures at its end."""


@dataclass(frozen=True)
class Recipe:
    """What every build of the real Dockerfile gets: the base, the hub, the two build secrets."""

    arguments: dict[str, str]
    secrets: dict[str, Path]
    hub: Hub
    token: str


@pytest.fixture(scope="session")
def engine() -> Engine:
    if (CACHE / "skip").is_file():
        pytest.skip((CACHE / "skip").read_text(encoding="utf-8").strip())
    if not (CACHE / "engine").is_file():
        pytest.skip("nothing is set up here: run make image-test")
    RUN.append(Engine((CACHE / "engine").read_text(encoding="utf-8").strip()))
    return RUN[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine in RUN:
        terminalreporter.section("figures")
        for name, value in engine.figures.items():
            terminalreporter.write_line(f"{name}: {value}")


@contextmanager
def links(folder: Path) -> Iterator[str]:
    """A folder of wheels as a page of links: a package index of the builds."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def wheels() -> Iterator[str]:
    with links(CACHE / "base" / "wheels") as url:
        yield url


@pytest.fixture(scope="session")
def recipe(wheels: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("secrets")
    token = f"hf_{secrets.token_hex(17)}"
    (folder / "HF_TOKEN").write_text(token, encoding="utf-8")
    configuration = f"[install]\nno-index = true\nfind-links = {wheels}\n"
    (folder / "pip.conf").write_text(configuration, encoding="utf-8")
    # The folder itself may hold more than the hub would.
    shutil.copytree(ROOT / "models" / "tiny", folder / "tiny")
    hub = Hub(token=token)
    hub.add(MODEL, folder / "tiny", gated=True)
    shutil.copytree(ROOT / "models" / "tiny-gguf", folder / "tiny-gguf")
    hub.add(GGUF.partition(":")[0], folder / "tiny-gguf")
    with Running(hub) as running:
        yield Recipe(
            {"BASE_IMAGE": BASE, "MODEL": MODEL, "HF_ENDPOINT": running.url},
            {"HF_TOKEN": folder / "HF_TOKEN", "pip.conf": folder / "pip.conf"},
            hub,
            token,
        )


@pytest.fixture(scope="session")
def bundled(engine: Engine, recipe: Recipe) -> Built:
    """The real Dockerfile with the tiny model baked in."""
    return engine.build(BUNDLED, arguments=recipe.arguments, secrets=recipe.secrets)


@pytest.fixture(scope="session")
def iteration(engine: Engine, bundled: Built) -> Built:
    """Dockerfile.iteration over it: what the container tests run."""
    return engine.build(
        ITERATION, dockerfile="Dockerfile.iteration", arguments={"WORKER_IMAGE": bundled.image}
    )


@pytest.fixture(scope="session")
def llama(engine: Engine, recipe: Recipe) -> Built:
    """The real Dockerfile over llama.cpp's base, with a GGUF model baked in."""
    return engine.build(
        "localhost/tripod-test/llama-bundled",
        arguments=recipe.arguments | {"BASE_IMAGE": LLAMA, "MODEL": GGUF},
        secrets=recipe.secrets,
    )
