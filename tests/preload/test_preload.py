"""`python -m preload` against a hub: what it leaves behind, and every way it can fail."""

import hashlib
import json
import os
import pty
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.preload.conftest import BIG, MIB, NEEDED, Preload, make_model
from tests.preload.hub import Running
from tests.support import eventually

Refused = Callable[..., str]


def paths(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_bakes_what_inference_needs(preload: Preload, served: Running, repository: Path) -> None:
    done = preload()
    assert done.returncode == 0, done.stderr
    assert paths(preload.baked) == NEEDED | {"manifest.json"}
    assert all(
        (preload.baked / name).read_bytes() == (repository / name).read_bytes() for name in NEEDED
    )
    assert paths(preload.into) == {f"org--tiny/{name}" for name in paths(preload.baked)}
    assert set(served.hub.requests) == NEEDED
    first, last = done.stdout.splitlines()
    commit = served.hub.repositories["org/tiny"].commit
    assert first == f"org/tiny: fetching 10 files, 25.2 MB, of commit {commit}"
    assert last == f"{preload.baked}: org/tiny is baked, 25.2 MB, every hash verified"


def test_manifest(preload: Preload, served: Running) -> None:
    assert preload(MODEL_REVISION="v1").returncode == 0
    folder = preload.into / "org--tiny@v1"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest.pop("files")
    assert [file["path"] for file in files] == sorted(NEEDED)
    for file in files:
        content = (folder / file["path"]).read_bytes()
        assert file["size"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest.pop("created_by").startswith("python -m preload, huggingface_hub ")
    assert manifest == {
        "model": "org/tiny@v1",
        "repository": "org/tiny",
        "revision": "v1",
        "commit": served.hub.repositories["org/tiny"].commit,
        "gguf": None,
        "catalog": None,
        "adapter": False,
        "total_size": sum(file["size"] for file in files),
        "tokenizer": ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"],
    }


def test_second_run_fetches_nothing(preload: Preload, served: Running) -> None:
    preload()
    served.hub.sent.clear()
    done = preload(HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0
    assert "org/tiny is baked already, at commit" in done.stdout
    assert not served.hub.sent


def test_no_model_bakes_nothing(preload: Preload) -> None:
    done = preload(MODEL="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("MODEL is not set: nothing is baked")
    assert not preload.into.exists()


def test_a_local_folder_needs_no_fetching(preload: Preload, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine", {"config.json", "model.safetensors"})
    assert preload(MODEL=str(folder)).stdout == (
        f"MODEL={folder} is on this machine: nothing is fetched\n"
    )


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MODEL": "org/absent"}, "no such repository, or it is private and HF_TOKEN is not set"),
        ({"MODEL": "org/absent", "HF_TOKEN": "hf_right"}, "or HF_TOKEN has no access to it"),
        ({"MODEL": "org/closed"}, "is gated; set HF_TOKEN (in an image build: the build secret"),
        ({"HF_TOKEN": "hf_wrong"}, "the hub refuses HF_TOKEN as invalid"),
        ({"HF_TOKEN": "hf_a\nb"}, "HF_TOKEN holds a character that no token has"),
        ({"MODEL": "org/tiny@v9"}, "the repository has no revision v9; name a branch"),
        ({"MODEL": "org/tiny@v1", "MODEL_REVISION": "v2"}, "but MODEL_REVISION=v2; give one"),
        ({"MODEL": "no model"}, "MODEL=no model: must be a hub id"),
        ({"MODEL": "/nowhere"}, "MODEL=/nowhere: there is no such folder"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub (127.0.0.1) can't be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to ask the hub"),
        ({"MODEL": "org/tiny:Q4_K_M"}, "MODEL=org/tiny:Q4_K_M: no GGUF file there fits Q4_K_M"),
    ],
)
def test_refusals(refused: Refused, variables: dict[str, str], sentence: str) -> None:
    said = refused(**variables)
    assert sentence in said
    for secret in ("hf_right", "hf_wrong", "hf_a"):
        assert secret not in said


def test_a_token_without_access(refused: Refused, served: Running) -> None:
    served.hub.token = "no-access"
    assert "the account of HF_TOKEN has no access" in refused(
        MODEL="org/closed", HF_TOKEN="no-access"
    )


def test_gated_with_a_token_that_stands_nowhere_afterwards(preload: Preload) -> None:
    done = preload(MODEL="org/closed", HF_TOKEN=" hf_right\n")
    assert done.returncode == 0
    assert "hf_right" not in done.stdout + done.stderr
    files = [path for path in preload.home.rglob("*") if path.is_file()]
    assert len(files) > len(NEEDED)
    assert not any(b"hf_right" in path.read_bytes() for path in files)


def test_token_from_a_build_secret(tmp_path: Path) -> None:
    from preload.__main__ import _token

    secret = tmp_path / "HF_TOKEN"
    assert _token({}, secret) is None
    secret.write_text("hf_secret\n")
    assert _token({"HF_TOKEN": ""}, secret) == "hf_secret"
    assert _token({"HF_TOKEN": "hf_set"}, secret) == "hf_set"


def test_full_disk_is_seen_before_the_first_byte(refused: Refused, served: Running) -> None:
    small = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1000)"
    said = refused(small)
    assert "not enough disk: 25.2 MB are still to be fetched, and 1.0 kB are free at" in said
    assert not served.hub.requests


def test_disk_that_fills_up(refused: Refused) -> None:
    full = (
        "import errno, pathlib, shutil\n"
        "def rename(self, target): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "pathlib.Path.rename = rename"
    )
    assert refused(full) == "MODEL=org/tiny: the download failed: the disk is full"


@pytest.mark.parametrize("name", [BIG, "config.json"])
def test_corrupt_file_is_removed(
    refused: Refused, preload: Preload, served: Running, name: str
) -> None:
    served.hub.wrong.add(name)
    assert f"MODEL=org/tiny: {name} came with hash " in refused()
    assert preload.partial
    assert not {name, f"{name}.incomplete"} & paths(preload.partial)
    served.hub.wrong.clear()
    assert preload().returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_then_resumed(
    preload: Preload, served: Running, repository: Path, number: int
) -> None:
    served.hub.hold_at[BIG] = 22 * MIB
    process = preload.start()

    def most_is_there() -> bool:
        part = preload.partial
        return bool(part) and paths(part) >= NEEDED - {BIG} and _size(part) == 20 * MIB

    def _size(part: Path) -> int:
        path = part / f"{BIG}.incomplete"
        return path.stat().st_size if path.exists() else 0

    eventually(most_is_there, 30, "20 MiB of the second shard, and all the rest")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == (
        "preload: MODEL=org/tiny: interrupted; run this again to go on from here"
    )
    assert not preload.baked.exists()

    eventually(lambda: served.hub.sending == 0, 30, "the hub sees that its client is gone")
    served.release()
    served.hub.sent.clear()
    done = preload()
    assert done.returncode == 0, done.stderr
    assert "(21.0 MB are here already)" in done.stdout
    assert served.hub.sent == {BIG: 4 * MIB}
    assert (preload.baked / BIG).read_bytes() == (repository / BIG).read_bytes()
    assert preload.partial is None
    assert paths(preload.baked) == NEEDED | {"manifest.json"}


def test_cut_connection_is_taken_up_again(preload: Preload, served: Running) -> None:
    served.hub.cut_at[BIG] = 21 * MIB
    done = preload()
    assert done.returncode == 0, done.stderr
    assert served.hub.requests.count(BIG) == 2


def test_what_an_older_commit_left_is_removed(preload: Preload) -> None:
    old = preload.into / f".partial-org--tiny-{'0' * 40}"
    other = preload.into / f".partial-org--tiny-two-{'0' * 40}"
    for folder in (old, other):
        folder.mkdir(parents=True)
    assert preload().returncode == 0
    assert not old.exists()
    assert other.exists()


def test_what_stands_in_the_way_is_left_alone(preload: Preload) -> None:
    preload.baked.mkdir(parents=True)
    (preload.baked / "mine").write_text("precious")
    done = preload()
    assert done.returncode == 1
    assert "org--tiny is in the way, and it is no whole model: it has no readable" in done.stderr
    assert paths(preload.baked) == {"mine"}


def test_one_gguf_file_and_the_small_ones(
    preload: Preload, served: Running, tmp_path: Path
) -> None:
    names = {"config.json", "README.md", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "tiny-f16.gguf"}
    served.hub.add("org/gguf", make_model(tmp_path / "gguf", names))
    assert preload(MODEL="org/gguf:q4_k_m").returncode == 0
    folder = preload.into / "org--gguf--q4_k_m"
    assert paths(folder) == {"config.json", "tiny-Q4_K_M.gguf", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text())["gguf"] == "q4_k_m"


def test_a_file_too_large_for_plain_http(preload: Preload, served: Running) -> None:
    done = preload("import preload.fetch\npreload.fetch.HTTP_LIMIT = 2_000_000")
    assert done.returncode == 0, done.stderr
    assert paths(preload.baked) == NEEDED | {"manifest.json"}
    assert "fetched 100 %" in done.stderr


def test_plain_lines_without_a_terminal(preload: Preload) -> None:
    lines = preload().stderr.splitlines()
    assert 2 <= len(lines) <= 10
    assert lines[-1] == "fetched 100 %, 25.2 MB of 25.2 MB"
    assert "\x1b" not in "".join(lines)


def test_a_bar_in_a_terminal(preload: Preload) -> None:
    control, terminal = pty.openpty()
    process = preload.start(stderr=terminal, TERM="xterm-256color", COLUMNS="120")
    os.close(terminal)
    shown = b"".join(_read(control))
    os.close(control)
    assert process.wait() == 0
    process.communicate()
    assert b"\x1b[" in shown
    assert b"25.2/25.2 MB" in shown
    assert b"fetched" not in shown


def _read(control: int) -> Iterator[bytes]:
    """What a terminal shows, until nobody holds its other end."""
    try:
        while piece := os.read(control, 65536):
            yield piece
    except OSError:
        return
