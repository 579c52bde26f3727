"""Where the files of a model are: baked, Runpod's cache, a network volume, or the hub."""

from dataclasses import dataclass
from pathlib import Path

from preload.model import Model

NEEDED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")
"""What inference reads; `.bin`, `.pth` and `original/` duplicates are never fetched."""


class WeightsError(Exception):
    """The model is nowhere to be had; the message says where was looked and what to do."""


@dataclass(frozen=True, slots=True)
class Places:
    """The folders that are searched, in this order, before the hub is asked."""

    baked: Path = Path("/models")
    runpod_cache: Path = Path("/runpod-volume/huggingface-cache/hub")
    volume: Path = Path("/runpod-volume")


@dataclass(frozen=True, slots=True)
class Weights:
    """A folder in Hugging Face layout, and one line that says which it is and why."""

    folder: Path
    why: str


def find(model: Model, *, token: str | None = None, places: Places | None = None) -> Weights:
    """Find the folder of `model`, downloading it only when it is nowhere on this machine.

    Raises:
        WeightsError: in one sentence, what is missing and what to do about it.
    """
    places = places or Places()
    if model.folder:
        if not (model.folder / "config.json").is_file():
            raise WeightsError(f"MODEL={model.folder}: the folder holds no config.json")
        return Weights(model.folder, f"{model.folder}: MODEL names this folder")
    assert model.repository
    if folder := _baked(model, places.baked):
        return Weights(folder, f"{folder}: {model} is baked into this image")
    if folder := _runpod_cache(model, places.runpod_cache):
        return Weights(folder, f"{folder}: {model} is in Runpod's model cache")
    if folder := _volume(model, places.volume):
        return Weights(folder, f"{folder}: {model} is on the network volume")
    return _hub(model, token)


def baked_folder(model: Model, root: Path) -> Path:
    """The folder that `model` is baked into, under the hub's own naming."""
    assert model.repository
    name = model.repository.replace("/", "--")
    return root / (f"{name}@{model.revision.replace('/', '--')}" if model.revision else name)


def _baked(model: Model, root: Path) -> Path | None:
    folder = baked_folder(model, root)
    return folder if (folder / "config.json").is_file() else None


def _runpod_cache(model: Model, root: Path) -> Path | None:
    """Runpod lower-cases some folder names, so they are compared without case."""
    assert model.repository
    wanted = "models--" + model.repository.replace("/", "--")
    repository = _child_without_case(root, wanted)
    if repository is None:
        return None
    revision = model.revision or "main"
    ref = repository / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshots = repository / "snapshots"
    if (snapshots / commit / "config.json").is_file():
        return snapshots / commit
    if model.revision or ref.is_file() or not snapshots.is_dir():
        return None
    complete = [path for path in sorted(snapshots.iterdir()) if (path / "config.json").is_file()]
    return complete[0] if len(complete) == 1 else None


def _volume(model: Model, root: Path) -> Path | None:
    """`models/org/name` or `org/name` on the volume; such a folder has no revisions."""
    assert model.repository
    if model.revision:
        return None
    for folder in (root / "models" / model.repository, root / model.repository):
        if (folder / "config.json").is_file():
            return folder
    return None


def _child_without_case(parent: Path, name: str) -> Path | None:
    if not parent.is_dir():
        return None
    matches = [path for path in parent.iterdir() if path.name.lower() == name.lower()]
    return next((path for path in matches if path.name == name), matches[0] if matches else None)


def _hub(model: Model, token: str | None) -> Weights:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert model.repository
    try:
        folder = snapshot_download(
            model.repository,
            revision=model.revision,
            token=token,
            allow_patterns=list(NEEDED),
            ignore_patterns=["original/*"],
        )
    except GatedRepoError:
        hint = "HF_TOKEN has no access to it" if token else "set HF_TOKEN to a token with access"
        raise WeightsError(f"MODEL={model}: this repository is gated; {hint}") from None
    except RevisionNotFoundError:
        raise WeightsError(f"MODEL={model}: the hub knows no such revision") from None
    except RepositoryNotFoundError:
        hint = "" if token else ", or it is private and HF_TOKEN is not set"
        raise WeightsError(f"MODEL={model}: the hub knows no such repository{hint}") from None
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"MODEL={model}: not on this machine, and the hub can't be reached"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise WeightsError(f"MODEL={model}: the download failed: {first_line}") from None
    return Weights(Path(folder), f"{folder}: {model} comes from the hub; it was on no local disk")
