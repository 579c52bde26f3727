"""The MODEL string → what it names."""

import re
from dataclasses import dataclass
from pathlib import Path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w./-]+")

ALLOWED = "a hub id (org/name or org/name@revision) or a local folder (/path or ./path)"


class ModelNameError(ValueError):
    """MODEL names nothing that Tripod can look for."""


@dataclass(frozen=True, slots=True)
class Model:
    """What MODEL names: a local `folder`, or a hub `repository` at a `revision`."""

    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.folder:
            return str(self.folder)
        return f"{self.repository}@{self.revision}" if self.revision else str(self.repository)


def parse(text: str) -> Model:
    """Read a MODEL string; a folder that exists wins over a hub id of the same spelling.

    Raises:
        ModelNameError: saying what is allowed.
    """
    text = text.strip()
    if text.startswith(("/", "./", "../", "~")) or (Path(text) / "config.json").is_file():
        return Model(folder=Path(text).expanduser().resolve())
    if text.startswith("openllm:"):
        raise ModelNameError(f"openllm:<tag> is not in this build yet; allowed is {ALLOWED}")
    if re.search(r"\.gguf|:I?Q\d", text, re.IGNORECASE):
        raise ModelNameError(f"GGUF files are not in this build yet; allowed is {ALLOWED}")
    repository, _, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(repository) or ("@" in text and not _REVISION.fullmatch(revision)):
        raise ModelNameError(f"must be {ALLOWED}")
    return Model(repository=repository, revision=revision or None)
