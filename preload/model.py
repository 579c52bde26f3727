"""The MODEL string → what it names."""

import re
from dataclasses import dataclass
from pathlib import Path

from preload.entry import Entry

_REPOSITORY = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", re.IGNORECASE | re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_CATALOG_TAG = re.compile(r"[a-z0-9][\w.-]*(:[a-z0-9][\w.-]*)?", re.IGNORECASE | re.ASCII)
_GGUF_FILE = re.compile(r"(\w[\w.+ -]*/)*\w[\w.+ -]*\.gguf", re.IGNORECASE | re.ASCII)
_GGUF_TYPE = re.compile(r"(UD-)?(I?Q\d|TQ\d|BF16|F16|F32|MXFP\d)\w*", re.IGNORECASE | re.ASCII)

ALLOWED = (
    "a hub id (org/name or org/name@revision), one GGUF file of a hub repository "
    "(org/name:file.gguf or org/name:Q4_K_M), a tag of OpenLLM's catalog (openllm:llama3.2:1b), "
    "or a local folder or GGUF file (/path or ./path)"
)


class ModelNameError(ValueError):
    """MODEL, or MODEL_REVISION beside it, names nothing that Tripod can look for."""


@dataclass(frozen=True, slots=True)
class Model:
    """What MODEL names: a local `folder`, or a hub `repository` at a `revision`.

    `gguf` is one file in either of them: its path, or the quantisation that tells it
    from its neighbours (`Q4_K_M`). `openllm` is a tag of OpenLLM's catalog; what it stands
    for is not known until the catalog was asked, and then `entry` is what it said. With `adapter`
    it is no model but a LoRA adapter, named in ENGINE_ARGS.
    """

    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None
    gguf: str | None = None
    openllm: str | None = None
    entry: Entry | None = None
    adapter: bool = False

    @property
    def label(self) -> str:
        """How a sentence about it begins: what named it, and its name."""
        return f"{'ENGINE_ARGS lora_modules path' if self.adapter else 'MODEL'}={self}"

    @property
    def excludes(self) -> list[str]:
        """Patterns of files that are not fetched."""
        return self.entry.excludes if self.entry else []

    def __str__(self) -> str:
        if self.openllm:
            return f"openllm:{self.openllm}"
        if self.folder:
            return str(self.folder / self.gguf if self.gguf else self.folder)
        name = f"{self.repository}@{self.revision}" if self.revision else str(self.repository)
        return f"{name}:{self.gguf}" if self.gguf else name


def parse(text: str, revision: str = "") -> Model:
    """Read a MODEL string; a folder or GGUF file that exists wins over a hub id so spelt.

    `revision` is MODEL_REVISION: the same as `org/name@revision`, empty when unset.

    Raises:
        ModelNameError: saying what is allowed.
    """
    text, revision = text.strip(), revision.strip()
    if text.startswith(("/", "./", "../", "~")) or _is_here(Path(text)):
        if revision:
            raise ModelNameError(f"a local model has no MODEL_REVISION={revision}; unset it")
        return _local(Path(text).expanduser().resolve())
    if text.startswith("openllm:"):
        return _catalogued(text.removeprefix("openllm:"), revision)
    head, colon, gguf = text.partition(":")
    repository, at, named = head.partition("@")
    if not _is_repository(repository) or (at and not _is_revision(named)):
        raise ModelNameError(f"must be {ALLOWED}")
    if colon and not _GGUF_FILE.fullmatch(gguf) and not _GGUF_TYPE.fullmatch(gguf):
        raise ModelNameError(f"must be {ALLOWED}")
    if revision and not _is_revision(revision):
        raise ModelNameError(f"MODEL_REVISION={revision} must be a branch, a tag or a commit")
    if named and revision and named != revision:
        raise ModelNameError(f"names {named}, but MODEL_REVISION={revision}; give one of the two")
    return Model(repository=repository, revision=named or revision or None, gguf=gguf or None)


def parse_adapter(text: str) -> Model:
    """Read the `path` of a LoRA adapter; a folder that exists wins over a hub id so spelt.

    Raises:
        ModelNameError: saying what is allowed.
    """
    text = text.strip()
    if text.startswith(("/", "./", "../", "~")) or Path(text).is_dir():
        return Model(folder=Path(text).expanduser().resolve(), adapter=True)
    repository, at, revision = text.partition("@")
    if not _is_repository(repository) or (at and not _is_revision(revision)):
        raise ModelNameError(
            "must be a hub id (org/name or org/name@revision) or a local folder (/path or ./path)"
        )
    return Model(repository=repository, revision=revision or None, adapter=True)


def _is_here(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _local(path: Path) -> Model:
    if path.suffix.lower() == ".gguf":
        return Model(folder=path.parent, gguf=path.name)
    return Model(folder=path)


def _catalogued(tag: str, revision: str) -> Model:
    if not _CATALOG_TAG.fullmatch(tag) or ".." in tag:
        raise ModelNameError("must be openllm:<tag> with a tag of OpenLLM's catalog: llama3.2:1b")
    if revision:
        raise ModelNameError(f"the catalog names the revision; unset MODEL_REVISION={revision}")
    return Model(openllm=tag)


def _is_repository(text: str) -> bool:
    """The hub's own rules; without `--`, a folder name can hold both parts."""
    return (
        _REPOSITORY.fullmatch(text) is not None
        and len(text) <= 96
        and not any(bad in text for bad in ("--", "..", "-/", "./"))
        and not text.endswith(("-", ".", ".git"))
    )


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text
