"""The manifest of a baked model: what is in the folder, and where it came from."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from preload.entry import Entry
from preload.model import Model

NAME = "manifest.json"
PARTIAL = ".partial-"
"""How the name of a folder begins that is not whole yet."""


class BakedFile(BaseModel):
    """A file of the folder: `size` in bytes, `sha256` in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """What `python -m preload` fetched.

    `model` is the MODEL string, `revision` what was asked for (None: the main branch),
    `commit` what it stood for at that time; `total_size` in bytes.
    `catalog` is what OpenLLM's catalog said, where MODEL was one of its tags; `adapter` tells a
    LoRA adapter from a model.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    repository: str
    revision: str | None
    commit: str
    gguf: str | None
    files: list[BakedFile]
    total_size: int
    tokenizer: list[str]
    created_by: str
    catalog: Entry | None = None
    adapter: bool = False

    def holds(self, model: Model) -> bool:
        """Whether this is what `model` names; the hub tells no case in repository names."""
        if model.openllm and not model.entry:
            return self.catalog is not None and self.catalog.tag == model.openllm
        if model.repository is None or model.repository.lower() != self.repository.lower():
            return False
        if (model.gguf or "").lower() != (self.gguf or "").lower():
            return False
        if model.adapter != self.adapter:
            return False
        asked = self.revision or "main"
        return (model.revision or "main") in (asked, self.commit)


def folder_name(model: Model) -> str:
    """`org--name[@revision][--gguf or --lora]`, with `/` inside a part as `--`."""
    name = str(model).replace("/", "--").replace(":", "--")
    return f"{name}--lora" if model.adapter else name


def read(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None if there is none, or none that can be read."""
    try:
        return Manifest.model_validate_json((folder / NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def problem(folder: Path) -> str | None:
    """Why `folder` is no whole baked model, or None if it is; looks at sizes, not at hashes."""
    manifest = read(folder)
    if manifest is None:
        return f"it has no readable {NAME}"
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            return f"{file.path} is missing"
        if (size := path.stat().st_size) != file.size:
            return f"{file.path} has {size} bytes instead of {file.size}"
    return None


def folders(root: Path) -> list[tuple[Path, Manifest]]:
    """Every folder under `root` with a manifest, whole or not, by name."""
    if not root.is_dir():
        return []
    found = [(path, read(path)) for path in sorted(root.iterdir()) if path.is_dir()]
    return [
        (path, manifest)
        for path, manifest in found
        if manifest and not path.name.startswith(PARTIAL)
    ]
