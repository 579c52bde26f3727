"""What the hub says about a repository, and its errors as one sentence each.

huggingface_hub reads HF_ENDPOINT, HF_HOME and the like when it is imported, so the import
waits until the hub is asked.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from preload import adapters, choose
from preload.errors import HubUnreachable, WeightsError, first_line
from preload.model import Model


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it: `size` in bytes, `sha256` if it is stored in LFS or Xet.

    `blob` is git's sha1 of the content (of a pointer to it where there is a `sha256`).
    """

    path: str
    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


def listing(model: Model, token: str | None) -> Listing:
    """Ask the hub for the commit that `model` names now, and for its files.

    Raises:
        WeightsError: as `errors` says it.
    """
    from huggingface_hub import HfApi

    assert model.repository
    with errors(model, token):
        info = HfApi().model_info(
            model.repository,
            revision=model.revision,
            files_metadata=True,
            timeout=30,
            token=token or False,
        )
    if info.sha is None or info.siblings is None:
        raise WeightsError(f"{model.label}: the hub's answer names no commit or no files")
    files = [
        RemoteFile(
            path=file.rfilename,
            size=file.size or 0,
            blob=file.blob_id or "",
            sha256=file.lfs.sha256 if file.lfs else None,
        )
        for file in info.siblings
    ]
    return Listing(info.sha, tuple(file for file in files if _stays_inside(file.path)))


def wanted(model: Model, token: str | None) -> tuple[Listing, list[RemoteFile]]:
    """The listing, and which of its files are to be fetched.

    Raises:
        WeightsError: as `errors` says it, or why what is there can't be used.
    """
    found = listing(model, token)
    if not model.adapter and not model.gguf and choose.is_adapter([f.path for f in found.files]):
        config = _content(model, found.commit, choose.ADAPTER_CONFIG, token)
        raise WeightsError(f"{model.label}: {adapters.instead(model, config)}")
    try:
        if model.adapter:
            return found, choose.adapter_files(found.files)
        return found, choose.files(found.files, model.gguf, model.excludes)
    except WeightsError as error:
        raise WeightsError(f"{model.label}: {error}") from None


def _content(model: Model, commit: str, path: str, token: str | None) -> bytes:
    """One small file."""
    from huggingface_hub import hf_hub_download

    assert model.repository
    with errors(model, token), TemporaryDirectory() as folder:
        file = hf_hub_download(
            model.repository, path, revision=commit, local_dir=folder, token=token or False
        )
        return Path(file).read_bytes()


def _stays_inside(path: str) -> bool:
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


@contextmanager
def errors(model: Model, token: str | None) -> Iterator[None]:
    """Turn whatever the hub, the network or the disk raises into one sentence.

    Raises:
        WeightsError: the sentence, which never holds the token.
        HubUnreachable: no answer came at all.
    """
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise WeightsError("HF_TOKEN holds a character that no token has; set it again")

    # HTTPError is that of httpx or httpx2, whichever this huggingface_hub is built on.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        hint = (
            "the account of HF_TOKEN has no access to it; ask for access on its page"
            if token
            else "set HF_TOKEN (in an image build: the build secret HF_TOKEN) "
            "to a token with access to it"
        )
        raise WeightsError(f"{model.label}: this repository is gated; {hint}") from None
    except RevisionNotFoundError:
        where = "after the @" if model.adapter else "after the @ or in MODEL_REVISION"
        raise WeightsError(
            f"{model.label}: the repository has no revision {model.revision}; "
            f"name a branch, a tag or a commit {where}"
        ) from None
    except RepositoryNotFoundError:
        raise WeightsError(f"{model.label}: {_unknown(token)}") from None
    except HfHubHTTPError as error:
        said = _status(error.response.status_code, token)
        raise WeightsError(f"{model.label}: {said}") from None
    except OfflineModeIsEnabled:
        raise HubUnreachable(
            f"{model.label}: not on this machine, and HF_HUB_OFFLINE forbids to ask the hub"
        ) from None
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise HubUnreachable(
            f"{model.label}: not on this machine, and the hub ({_host()}) can't be reached "
            f"({type(error).__name__})"
        ) from None
    except JSONDecodeError:
        raise WeightsError(
            f"{model.label}: what answers at HF_ENDPOINT={_host()} is no hub"
        ) from None
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else first_line(error)
        raise WeightsError(f"{model.label}: the download failed: {why}") from None


def _host() -> str | None:
    """Of HF_ENDPOINT, without the name and password that an address may hold."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname


def _unknown(token: str | None) -> str:
    hint = "HF_TOKEN has no access to it" if token else "it is private and HF_TOKEN is not set"
    return f"the hub knows no such repository, or {hint}; check the spelling"


def _status(code: int, token: str | None) -> str:
    if code == 401 and not token:
        return _unknown(token)
    if code == 401:
        return "the hub refuses HF_TOKEN as invalid; set a token that is valid, or none"
    if code == 403:
        return "the hub forbids this; HF_TOKEN may lack the permission to read repositories"
    return f"the hub answered with HTTP status {code}; try again later"


def need_room(model: Model, folder: Path, needed: int) -> None:
    """Check, before the first byte, that `needed` bytes are free where `folder` is or will be.

    Raises:
        WeightsError: they are not.
    """
    import shutil

    from rich.filesize import decimal

    exists = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(exists).free
    if needed > free:
        raise WeightsError(
            f"{model.label}: not enough disk: {decimal(needed)} are still to be fetched, "
            f"and {decimal(free)} are free at {exists}"
        )
