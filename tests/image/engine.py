"""The container engine, driven by its command line, and a way into a container's network."""

import ctypes
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "image"
BASE = "localhost/tripod-test/base"
LLAMA = "localhost/tripod-test/llama"
CLONE_NEWNET = 0x40000000


class CommandFailed(Exception):
    """The engine's command failed; the message ends with what it wrote."""


def eventually(condition: Callable[[], Any], timeout: float, what: Callable[[], str]) -> Any:
    """Wait until `condition` holds and return its value; fail with `what()` after `timeout` s."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what()}"
        time.sleep(0.05)
    return value


@dataclass(frozen=True, slots=True)
class Built:
    """An image, what its build wrote, and how long it took."""

    image: str
    log: str
    seconds: float


@dataclass(slots=True)
class Engine:
    """docker, or podman with the configuration that setup.sh wrote for it."""

    name: str
    logs: list[str] = field(default_factory=list)
    """Everything that builds and containers wrote, for the search for the secret."""
    figures: dict[str, str] = field(default_factory=dict)
    """What the run prints at its end."""

    @property
    def environment(self) -> dict[str, str]:
        if self.name == "docker":
            return {**os.environ}
        own = {
            "CONTAINERS_CONF": str(CACHE / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(CACHE / "storage.conf"),
        }
        return {**os.environ, **own}

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([self.name, *arguments], env=self.environment, **options)

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """Run a command of the engine and return its output.

        Raises:
            CommandFailed: it ended with another code than 0.
        """
        done = subprocess.run(
            [self.name, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            output = f"{done.stdout}{done.stderr}"
            raise CommandFailed(f"{self.name} {' '.join(arguments)}\n{output[-4000:]}")
        return done.stdout

    def build(
        self,
        image: str,
        *,
        context: Path = ROOT,
        dockerfile: str = "Dockerfile",
        arguments: dict[str, str] | None = None,
        secrets: dict[str, Path] | None = None,
    ) -> Built:
        command = [
            "build",
            "--network",
            "host",
            "--tag",
            image,
            "--file",
            str(context / dockerfile),
        ]
        if self.name == "podman":
            command += ["--pull=never", "--layers", "--format", "docker"]
        else:
            command += ["--progress", "plain"]
        for name, value in (arguments or {}).items():
            command += ["--build-arg", f"{name}={value}"]
        for name, file in (secrets or {}).items():
            command += ["--secret", f"id={name},src={file}"]
        begin = time.monotonic()
        with self.popen(
            *command, str(context), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout
            log = process.stdout.read()
        seconds = time.monotonic() - begin
        self.logs.append(log)
        self.figures[f"build of {image.rpartition('/')[2]}"] = f"{seconds:.1f} s"
        if process.returncode:
            raise CommandFailed(f"{self.name} {' '.join(command)}\n{log[-4000:]}")
        return Built(image, log, seconds)

    def inspect(self, image: str) -> dict[str, Any]:
        [described] = json.loads(self("image", "inspect", image))
        return described

    def layers(self, image: str) -> list[str]:
        """The digests of an image's layers, the lowest first."""
        return self.inspect(image)["RootFS"]["Layers"]

    @contextmanager
    def container(
        self, image: str, *options: str, command: tuple[str, ...] = ()
    ) -> Iterator["Container"]:
        """A container that runs until the block ends."""
        created = self("create", "--no-healthcheck", *options, image, *command)
        container = Container(self, created.split()[-1])
        try:
            container.start()
            yield container
        finally:
            container.remove()

    def once(self, image: str, *options: str, command: tuple[str, ...] = ()) -> tuple[int, str]:
        """Run a container to its end: exit code and what it wrote."""
        with self.container(image, "--network", "none", *options, command=command) as container:
            return container.wait(), container.text()


class Container:
    """A container, and the lines it writes as they come."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self.lines: list[str] = []

    def start(self) -> None:
        self._process = self.engine.popen(
            "start", "--attach", "--sig-proxy=false", self.name,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout:
            self.lines.extend(line.rstrip("\n") for line in self._process.stdout)

    def state(self, field: str) -> str:
        return self.engine("inspect", "--format", f"{{{{.State.{field}}}}}", self.name).strip()

    @property
    def pid(self) -> int:
        """The process id, on this machine, of what is PID 1 in the container."""
        return int(
            eventually(
                lambda: self.state("Pid") not in {"", "0"} and self.state("Pid"), 30, self.text
            )
        )

    def find(self, text: str) -> str | None:
        return next((line for line in list(self.lines) if text in line), None)

    def text(self) -> str:
        return "\n".join(self.lines)

    def says(self, text: str, timeout: float = 240) -> str:
        """The first line with `text`, waited for; fails at once when the container ends."""

        def said() -> str | None:
            found = self.find(text)
            assert found or self._process.poll() is None, f"ended without {text!r}:\n{self.text()}"
            return found

        return eventually(said, timeout, lambda: f"{text!r} in\n{self.text()}")

    def wait(self, timeout: float = 120) -> int:
        self._process.wait(timeout)
        self._reader.join()
        return int(self.state("ExitCode"))

    def stop(self, seconds: int) -> tuple[int, float]:
        """SIGTERM, and SIGKILL after `seconds`: exit code and how long it took."""
        begin = time.monotonic()
        self.engine("stop", "--time", str(seconds), self.name, timeout=seconds + 60)
        took = time.monotonic() - begin
        return self.wait(), took

    def remove(self) -> None:
        at_once = ("--time", "0") if self.engine.name == "podman" else ()
        self.engine("rm", "--force", *at_once, self.name)
        self._process.wait(30)
        self._reader.join()
        self.engine.logs.append(self.text())


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """What this thread and its children open meanwhile lies in the network of process `pid`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(file: int) -> None:
        if libc.setns(file, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the container's network can't be entered")

    with open("/proc/thread-self/ns/net") as home, open(f"/proc/{pid}/ns/net") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


def copy_of_context(folder: Path) -> Path:
    """A copy of what the image is built from, to edit and build again."""
    for name in ("worker", "preload"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements").mkdir()
    for name in (
        "Dockerfile", "Dockerfile.iteration", ".dockerignore", "Dockerfile.iteration.dockerignore",
        "start.sh", "requirements/image.txt", "requirements/openllm.sh", "requirements/openllm.txt",
    ):  # fmt: skip
        shutil.copy2(ROOT / name, folder / name)
    return folder
