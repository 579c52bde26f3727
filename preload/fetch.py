"""Fetch a model from the hub into a folder that is either whole or not there.

Everything goes to `.partial-<folder>-<commit>` first. A file has `.incomplete` behind its
name until its hash is that of the hub, and the folder gets its own name last of all.
"""

import glob
import hashlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from preload import choose, hub, progress
from preload import manifest as manifests
from preload.errors import WeightsError
from preload.hub import Listing, RemoteFile
from preload.manifest import PARTIAL, BakedFile, Manifest
from preload.model import Model

AT_ONCE = 4
"""Files fetched at a time."""

HTTP_LIMIT = 50_000_000_000
"""Bytes: the hub serves larger files through Xet only, which can't resume inside a file."""

ASIDE = ".aside"
"""Where such a file arrives, beside what huggingface_hub notes down about it."""


@dataclass(frozen=True, slots=True)
class Download:
    """What to fetch of `listing`, and the folder that collects it."""

    model: Model
    token: str | None
    listing: Listing
    files: list[RemoteFile]
    folder: Path

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def here(self) -> int:
        """Bytes that an earlier run has fetched already."""
        return sum(_here(self.folder / file.path, file) for file in self.files)


def prepare(model: Model, into: Path, token: str | None) -> Download:
    """Decide what to fetch, and see to it that it fits on the disk.

    Raises:
        WeightsError: it can't be fetched; nothing was downloaded.
    """
    name = manifests.folder_name(model)
    what = "adapter" if model.adapter else "model"
    if (into / name).exists():
        raise WeightsError(
            f"{model.label}: {into / name} is in the way, and it is no whole {what}: "
            f"{manifests.problem(into / name)}; remove it and run this again"
        )
    listing, files = hub.wanted(model, token)
    folder = into / f"{PARTIAL}{name}-{listing.commit}"
    with hub.errors(model, token):
        folder.mkdir(parents=True, exist_ok=True)
        for other in into.glob(glob.escape(f"{PARTIAL}{name}-") + "[0-9a-f]" * 40):
            if other != folder:  # of another commit
                shutil.rmtree(other)
    download = Download(model, token, listing, files, folder)
    hub.need_room(model, into, download.total - download.here)
    return download


def finish(download: Download, into: Path) -> tuple[Path, Manifest]:
    """Fetch what is missing, verify it, and give the folder its name.

    Raises:
        WeightsError: the download failed or a file is not what the hub says; what is
            good stays for the next run.
    """
    model = download.model
    with hub.errors(model, download.token), progress.shown(download.total) as advance:
        baked = _all_files(download, advance)
        shutil.rmtree(download.folder / ASIDE, ignore_errors=True)
        manifest = _manifest(download, baked)
        text = manifest.model_dump_json(indent=2) + "\n"
        (download.folder / manifests.NAME).write_text(text, encoding="utf-8")
        folder = into / manifests.folder_name(model)
        download.folder.rename(folder)
    return folder, manifest


def _all_files(download: Download, advance: progress.Advance) -> list[BakedFile]:
    # Its warnings of a retry would tear the display; what fails for good is raised.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")
    try:
        # Small files first: a repository that is closed to us says so at once.
        by_size = sorted(download.files, key=lambda file: file.size)
        futures = [pool.submit(_one_file, download, file, advance) for file in by_size]
        return sorted((done.result() for done in as_completed(futures)), key=lambda f: f.path)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _one_file(download: Download, file: RemoteFile, advance: progress.Advance) -> BakedFile:
    target = download.folder / file.path
    advance(_here(target, file))
    if not target.is_file():
        incomplete = _incomplete(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _transfer(download, file, incomplete, advance)
        _verify(download.model, file, incomplete)
        incomplete.rename(target)
    return BakedFile(path=file.path, size=file.size, sha256=file.sha256 or _sha256(target))


def _incomplete(target: Path) -> Path:
    return target.with_name(target.name + ".incomplete")


def _here(target: Path, file: RemoteFile) -> int:
    """How many bytes of `file` are there, verified or not; what can't be right is removed."""
    if target.is_file():
        return file.size
    incomplete = _incomplete(target)
    if not incomplete.is_file():
        return 0
    if (size := incomplete.stat().st_size) > file.size:
        incomplete.unlink()
        return 0
    return size


def _transfer(
    download: Download, file: RemoteFile, incomplete: Path, advance: progress.Advance
) -> None:
    """Go on where `incomplete` ends.

    hf_hub_download throws a partial file away when it is interrupted; the function under
    it can resume.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get

    assert download.model.repository
    name, token = download.model.repository, download.token
    commit = download.listing.commit
    bar = progress.bar_for(advance)
    if file.size > HTTP_LIMIT:
        whole = hf_hub_download(
            name,
            file.path,
            revision=commit,
            local_dir=download.folder / ASIDE,
            token=token or False,
            tqdm_class=bar,
        )
        Path(whole).rename(incomplete)
        return
    # As it is stored, so that bytes can be counted; the token stays with the hub on redirects.
    headers = {"Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    with incomplete.open("ab") as stream:
        http_get(
            hf_hub_url(name, file.path, revision=commit),
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.path,
            tqdm_class=bar,
        )


def _verify(model: Model, file: RemoteFile, path: Path) -> None:
    found = _sha256(path) if file.sha256 else _git_sha1(path, file.size)
    wanted = file.sha256 or file.blob
    if found != wanted:
        path.unlink()
        raise WeightsError(
            f"{model.label}: {file.path} came with hash {found[:12]}… instead of the hub's "
            f"{wanted[:12]}… and was removed; run this again to fetch it anew"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_sha1(path: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _manifest(download: Download, baked: list[BakedFile]) -> Manifest:
    from huggingface_hub import __version__

    model = download.model
    assert model.repository
    return Manifest(
        model=str(model),
        repository=model.repository,
        revision=model.revision,
        commit=download.listing.commit,
        gguf=model.gguf,
        files=baked,
        total_size=download.total,
        tokenizer=choose.tokenizer(file.path for file in baked),
        created_by=f"python -m preload, huggingface_hub {__version__}",
        catalog=model.entry,
        adapter=model.adapter,
    )
