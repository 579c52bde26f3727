"""Where the files of a model are: baked, Runpod's cache, a network volume, or the hub."""

import glob
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from preload import adapters, catalog, choose, hub, manifest
from preload.entry import Entry
from preload.errors import HubUnreachable, WeightsError
from preload.model import Model

__all__ = ["BAKED", "WITHOUT", "Places", "Weights", "WeightsError", "find"]

log = logging.getLogger(__name__)

BAKED = Path("/models")

WITHOUT = ("openllm", "remote")
"""Engines that bring their own weights; for the others those of MODEL are found."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Places:
    """The folders that are searched, in this order, before the hub is asked.

    `hub_cache` is where the hub's answer is kept; None: where huggingface_hub keeps it.
    """

    baked: Path = BAKED
    runpod_cache: Path = Path("/runpod-volume/huggingface-cache/hub")
    volumes: tuple[Path, ...] = (Path("/runpod-volume"), Path("/workspace"))
    hub_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's folder, and one line that says which it is and why.

    The folder is in Hugging Face layout, or holds `gguf`: one file, or the first of its parts.
    `catalog` is what OpenLLM's catalog says of the model, where MODEL is one of its tags.
    """

    folder: Path
    why: str
    gguf: Path | None = None
    catalog: Entry | None = None


def find(model: Model, *, token: str | None = None, places: Places | None = None) -> Weights:
    """Find the files of `model`, downloading them only when they are nowhere on this machine.

    Raises:
        WeightsError: in one sentence, what is missing and what to do about it.
    """
    places = places or Places()
    if model.folder:
        if lacks := missing(model, model.folder):
            raise WeightsError(f"{model.label}: {lacks}")
        kind = "file" if model.gguf else "folder"
        named = "ENGINE_ARGS names" if model.adapter else "MODEL names"
        return _found(model, model.folder, f"{named} this {kind}")
    if model.openllm and not model.entry:
        return _catalogued(model, token, places)
    if folder := _baked(model, places.baked):
        return _found(model, folder, f"{model} is baked into this image")
    if folder := _cached(model, places.runpod_cache):
        return _found(model, folder, f"{model} is in Runpod's model cache")
    for volume in places.volumes:
        if folder := _volume(model, volume):
            return _found(model, folder, f"{model} is on the network volume")
    return _hub(model, token, places)


def _found(model: Model, folder: Path, why: str) -> Weights:
    if model.gguf is None:
        return Weights(folder, f"{folder}: {why}")
    file = gguf_parts(folder, model.gguf)[0]
    return Weights(folder, f"{file}: {why}", file)


def missing(model: Model, folder: Path) -> str | None:
    """What `folder` lacks to be the whole `model`, or None.

    That is a model in Hugging Face layout, a GGUF file with all its parts, or an adapter.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if model.adapter:
        return adapters.missing(folder)
    if model.gguf:
        try:
            gguf_parts(folder, model.gguf)
        except WeightsError as error:
            return str(error)
        return None
    if (folder / "mlc-chat-config.json").is_file() and any(folder.glob("params_shard_*.bin")):
        return None
    if choose.is_adapter([path.name for path in folder.iterdir()]):
        return adapters.instead(model, (folder / choose.ADAPTER_CONFIG).read_bytes())
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        return "the folder holds no config.json"
    indexes = sorted(folder.glob("*.index.json"))
    for index in indexes:
        for name in sorted(_indexed(index)):
            if not (folder / name).is_file():
                return f"{name} is missing, which {index.name} names"
    if indexes or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    return "the folder holds neither *.safetensors nor pytorch_model*.bin"


def gguf_parts(folder: Path, wanted: str) -> list[Path]:
    """As `choose.gguf_parts`, of the files in `folder`."""
    named = wanted.lower().endswith(".gguf")
    paths = (folder / wanted).parent.glob("*") if named else folder.rglob("*")
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return [folder / name for name in choose.gguf_parts(names, wanted)]


def _indexed(index: Path) -> set[str]:
    """The weight files that an index maps tensors to."""
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _catalogued(model: Model, token: str | None, places: Places) -> Weights:
    """By the tag that `python -m preload` noted; only without it is the catalog asked."""
    volumes = [(volume / "models", "on the network volume") for volume in places.volumes]
    for root, where in [(places.baked, "baked into this image"), *volumes]:
        folder = _baked(model, root)
        if folder and (held := manifest.read(folder)):
            return Weights(folder, f"{folder}: {model} is {where}", catalog=held.catalog)
    resolved = catalog.resolve(model)
    log.info("%s is %s", model, resolved.entry)
    return replace(find(resolved, token=token, places=places), catalog=resolved.entry)


def _baked(model: Model, root: Path) -> Path | None:
    for folder, held in manifest.folders(root):
        if held.holds(model):
            if (problem := manifest.problem(folder)) is None:
                return folder
            log.warning("%s is passed over: %s", folder, problem)
    folder = root / manifest.folder_name(model)
    if folder.is_dir() and manifest.read(folder) is None:
        log.warning("%s is passed over: %s", folder, manifest.problem(folder))
    return None


def _cached(model: Model, root: Path) -> Path | None:
    """A snapshot in the layout of huggingface_hub's cache.

    Runpod lower-cases some folder names, so they are compared without case.
    """
    assert model.repository
    repository = _child_without_case(root, "models--" + model.repository.replace("/", "--"))
    if repository is None:
        return None
    revision = model.revision or "main"
    ref = repository / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshots = repository / "snapshots"
    if missing(model, snapshots / commit) is None:
        return snapshots / commit
    if model.revision or ref.is_file() or not snapshots.is_dir():
        return None
    whole = [path for path in sorted(snapshots.iterdir()) if missing(model, path) is None]
    return whole[0] if len(whole) == 1 else None


def _child_without_case(parent: Path, name: str) -> Path | None:
    if not parent.is_dir():
        return None
    matches = [path for path in parent.iterdir() if path.name.lower() == name.lower()]
    return next((path for path in matches if path.name == name), matches[0] if matches else None)


def _volume(model: Model, root: Path) -> Path | None:
    """What `python -m preload --into <volume>/models` left, or a plain `[models/]org/name`.

    A plain folder has no revisions.
    """
    assert model.repository
    if folder := _baked(model, root / "models"):
        return folder
    if model.revision:
        return None
    for folder in (root / "models" / model.repository, root / model.repository):
        if missing(model, folder) is None:
            return folder
    return None


def _hub(model: Model, token: str | None, places: Places) -> Weights:
    from huggingface_hub import constants, snapshot_download
    from rich.filesize import decimal

    assert model.repository
    cache = places.hub_cache or Path(constants.HF_HUB_CACHE)
    held = _cached(model, cache)
    if held and _COMMIT.fullmatch(model.revision or ""):
        return _found(model, held, f"{model} is in the Hugging Face cache of this machine")
    try:
        listing, files = hub.wanted(model, token)
    except HubUnreachable:
        if held is None:
            raise
        where = "is in the Hugging Face cache of this machine, and the hub can't be reached"
        return _found(model, held, f"{model} {where}")
    name = model.repository.replace("/", "--")
    snapshot = cache / f"models--{name}" / "snapshots" / listing.commit
    size = sum(file.size for file in files if not _is_there(snapshot / file.path, file.size))
    if size == 0:
        where = "is in the Hugging Face cache of this machine, as the hub has it now"
        return _found(model, snapshot, f"{model} {where}")
    hub.need_room(model, cache, size)
    log.warning("%s: a download of %s follows", _not_here(model, places), decimal(size))
    with hub.errors(model, token):
        folder = snapshot_download(
            model.repository,
            revision=model.revision,
            cache_dir=cache,
            token=token or False,
            allow_patterns=[glob.escape(file.path) for file in files],
        )
    return _found(model, Path(folder), f"{model} comes from the hub; it was on no local disk")


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _not_here(model: Model, places: Places) -> str:
    names = [held.model for _, held in manifest.folders(places.baked)]
    if names:
        return f"{model.label} is not what this image holds (baked: {', '.join(names)})"
    return f"{model.label} is neither baked into this image nor on any disk here"
