"""`openllm serve` of the user's own bento."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from worker.engines.servers.kind import ServerKind
from worker.errors import EngineStartError

SLOTS = 64
"""Requests at once for CONCURRENCY_MODIFIER=auto: a bento does not say how many it works on."""


class OpenLlm(ServerKind):
    """`openllm serve` of the user's own bento; MODEL is its tag, or its folder in a repository."""

    name = "openllm"
    program = "openllm"
    ready = "/readyz"
    auto_slots: ClassVar[int] = SLOTS

    def command(self, program: str, port: int) -> list[str]:
        tag, _ = self._bento()
        return [program, "serve", tag, "--port", str(port)]

    def variables(self) -> dict[str, str]:
        _, repository = self._bento()
        own = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOST": "127.0.0.1"}
        # Without it, `serve` updates its list of repositories from the network first.
        return own | ({"OPENLLM_TEST_REPO": str(repository)} if repository else {})

    def _bento(self) -> tuple[str, Path | None]:
        """The bento's tag, and the repository that holds it where MODEL is a folder."""
        folder = Path(self.settings.model).expanduser()
        if not folder.is_dir():
            return self.settings.model.removeprefix("openllm:"), None
        folder = folder.resolve()
        if not (folder / "bento.yaml").is_file() or folder.parts[-4:-2] != ("bentoml", "bentos"):
            raise EngineStartError(
                f"MODEL={folder}: it must be the folder of a bento in a repository of OpenLLM, "
                "…/bentoml/bentos/NAME/VERSION, and hold bento.yaml"
            )
        return f"{folder.parent.name}:{folder.name}", folder.parents[3]

    @classmethod
    def argument_problems(cls, args: dict[str, Any]) -> list[str]:
        """A bento keeps the arguments it was built with, whatever `openllm serve --arg` says."""
        if not args:
            return []
        return ["a bento has the arguments it was built with; give it environment variables"]
