"""`openllm:<tag>`: the real `openllm` over small catalogs, and a hub that has their models."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from preload import catalog, weights
from preload.model import parse
from tests.openllm import Catalog, catalog_of_tiny, install
from tests.preload.conftest import NEEDED, Preload
from tests.preload.hub import Hub, Running
from tests.support import left

Refused = Callable[..., str]
TAG = "openllm:tiny:1b"


@pytest.fixture(scope="module", autouse=True)
def openllm() -> None:
    install()


@pytest.fixture(scope="module")
def commit(repository: Path) -> str:
    return Hub().add("Tripod/Tiny", repository).commit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, commit: str) -> Catalog:
    """Four entries of two models, one of them behind a token."""
    small = catalog_of_tiny(
        tmp_path_factory.mktemp("catalog"),
        commit,
        max_model_len=512,
        limit_mm_per_prompt={"image": 1},
    )
    for size in ("3b", "70b"):
        small.add(
            "tiny",
            f"{size}-instruct-beef",
            alias=size,
            model_id=f"Tripod/Tiny-{size}",
            revision="0" * 40,
            arguments={"tensor_parallel_size": 4},
            gpu=(4, "nvidia-a100-80gb"),
            token=True,
        )
    small.add("mistral", "8b-f00d", model_id="org/m", revision="0" * 40, arguments={})
    small.make_aliases()
    return small


@pytest.fixture
def served(repository: Path) -> Iterator[Running]:
    hub = Hub(token="hf_right")
    hub.add("Tripod/Tiny", repository)
    hub.add("Tripod/Tiny-3b", repository, gated=True, tags=("0" * 40,))
    with Running(hub) as running:
        yield running


@pytest.fixture
def with_catalog(preload: Preload, small: Catalog, monkeypatch: pytest.MonkeyPatch) -> Preload:
    plain = preload.environment
    monkeypatch.setattr(
        preload,
        "environment",
        lambda **more: plain(**{"OPENLLM_TEST_REPO": str(small.folder), "MODEL": TAG} | more),
    )
    return preload


def test_a_tag_is_resolved_and_baked(with_catalog: Preload, served: Running, commit: str) -> None:
    done = with_catalog()
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first == f"openllm:tiny:1b is Tripod/Tiny@{commit}, meant for 1 x nvidia-l4"
    assert second.endswith(f"of commit {commit}")
    folder = with_catalog.into / "openllm--tiny--1b"
    assert last.startswith(f"{folder}: openllm:tiny:1b is baked, 25.2 MB")
    assert set(served.hub.requests) == NEEDED
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == TAG
    assert (manifest["repository"], manifest["revision"]) == ("Tripod/Tiny", commit)
    assert manifest["catalog"] == {
        "tag": "tiny:1b",
        "bento": "tiny:1b-instruct-c0de",
        "repository": "Tripod/Tiny",
        "revision": commit,
        "excludes": ["*.pth", "*.pt", "original/**/*", "consolidated*"],
        "needs_token": False,
        "gpu": "nvidia-l4",
        "gpus": 1,
        "engine_args": {
            "disable_log_requests": True,
            "max_log_len": 1000,
            "request_logger": None,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "enable_tool_call_parser": True,
            "enable_reasoning": True,
            "tensor_parallel_size": 1,
            "max_model_len": 512,
            "limit_mm_per_prompt": {"image": 1},
        },
    }

    # From here on neither OpenLLM nor the hub is needed.
    without = "import preload.catalog, pathlib; preload.catalog.program = lambda: None"
    again = with_catalog(without, HF_ENDPOINT="http://127.0.0.1:9")
    assert "openllm:tiny:1b is baked already" in again.stdout
    found = weights.find(parse(TAG), places=weights.Places(baked=with_catalog.into))
    assert found.folder == folder
    assert found.why == f"{folder}: openllm:tiny:1b is baked into this image"
    assert found.catalog
    assert found.catalog.engine_args["max_model_len"] == 512
    plain = weights.find(
        parse(f"tripod/tiny@{commit}"), places=weights.Places(baked=with_catalog.into)
    )
    assert (plain.folder, plain.catalog) == (folder, None)


def test_what_an_entry_excludes_is_not_fetched(with_catalog: Preload, commit: str) -> None:
    catalog = catalog_of_tiny(with_catalog.home / "other", commit)
    bento = catalog.folder / "bentoml/bentos/tiny/1b-instruct-c0de/bento.yaml"
    bento.write_text(bento.read_text().replace("'*.pt'", "modeling*\n      - LICENSE"))
    catalog.make_aliases()
    done = with_catalog(OPENLLM_TEST_REPO=str(catalog.folder))
    assert done.returncode == 0, done.stderr
    baked = {path.name for path in (with_catalog.into / "openllm--tiny--1b").iterdir()}
    assert baked == NEEDED - {"modeling_tiny.py", "LICENSE"} | {"manifest.json"}


def test_not_baked_it_is_resolved_at_run_time(
    with_catalog: Preload, small: Catalog, commit: str
) -> None:
    code = (
        "import logging; logging.basicConfig(level=20, format='%(message)s')\n"
        "from preload import weights, model\n"
        f"found = weights.find(model.parse({TAG!r}))\n"
        "print(found.folder.name, found.catalog.engine_args['max_model_len'])\n"
    )
    done = with_catalog.python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{commit} 512\n"
    assert f"openllm:tiny:1b is Tripod/Tiny@{commit}" in done.stderr


def test_a_token_where_the_catalog_asks_for_one(with_catalog: Preload, refused: Refused) -> None:
    assert "openllm:tiny:3b: this repository is gated; set HF_TOKEN" in refused(
        MODEL="openllm:tiny:3b"
    )
    assert with_catalog.ran[-1].stdout.startswith(
        f"openllm:tiny:3b is Tripod/Tiny-3b@{'0' * 40}, meant for 4 x nvidia-a100-80gb, "
        "needs HF_TOKEN\n"
    )
    done = with_catalog(MODEL="openllm:tiny:3b", HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("tag", "sentence"),
    [
        ("tiny:2b", "OpenLLM's catalog has no such tag; near are tiny:"),
        ("tiny", "the catalog has several of it; name one of tiny:1b, tiny:3b, tiny:70b"),
        ("zzz:qqq", "OpenLLM's catalog has no such tag among its 4; `openllm model list` shows it"),
    ],
)
@pytest.mark.usefixtures("with_catalog")
def test_unknown_tags(refused: Refused, tag: str, sentence: str) -> None:
    assert f"MODEL=openllm:{tag}: {sentence}" in refused(MODEL=f"openllm:{tag}")


@pytest.mark.usefixtures("with_catalog")
def test_an_empty_catalog(refused: Refused, tmp_path: Path) -> None:
    assert "OpenLLM's catalog is empty or could not be fetched" in refused(
        OPENLLM_TEST_REPO=str(tmp_path)
    )


@pytest.mark.usefixtures("with_catalog")
def test_an_entry_without_a_model_of_the_hub(refused: Refused, tmp_path: Path) -> None:
    own = Catalog(tmp_path / "own")
    own.add("mine", "1", model_id="org/name", revision="main", arguments={})
    bento = own.folder / "bentoml/bentos/mine/1/bento.yaml"
    bento.write_text(bento.read_text().replace("registry: huggingface", "registry: bentoml"))
    said = refused(OPENLLM_TEST_REPO=str(own.folder), MODEL="openllm:mine:1")
    assert said.startswith("MODEL=openllm:mine:1: the catalog's entry can't be read (")
    assert said.endswith("is served with ENGINE=openllm")


def test_an_own_bento_is_not_resolved(with_catalog: Preload) -> None:
    done = with_catalog(MODEL="openllm:mine", ENGINE="openllm")
    assert done.returncode == 0
    assert done.stdout == "ENGINE=openllm brings its own weights: nothing is baked\n"


@pytest.mark.usefixtures("with_catalog")
def test_without_openllm(refused: Refused) -> None:
    without = "import preload.catalog; preload.catalog.program = lambda: None"
    said = refused(without)
    assert "MODEL=openllm:tiny:1b: OpenLLM, which knows what this tag names, is not" in said
    assert "install it with `sh " in said


def test_a_call_that_does_not_end_leaves_nothing_behind(
    with_catalog: Preload, refused: Refused
) -> None:
    said = refused("import preload.catalog; preload.catalog.TIMEOUT = 0.1")
    assert said == (
        "MODEL=openllm:tiny:1b: `openllm model get tiny:1b --verbose` did not end within 0.1 s"
    )
    assert left([each for each in psutil.process_iter() if home(each) == with_catalog.home]) == []


def home(process: psutil.Process) -> Path | None:
    """HOME of a process; here every test has one of its own."""
    with suppress(psutil.Error):
        return Path(process.environ().get("HOME", ""))
    return None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_catalog_comes_by_git_and_leaves_nothing_behind(
    preload: Preload, commit: str, tmp_path: Path
) -> None:
    origin = catalog_of_tiny(tmp_path / "origin", commit).folder
    for command in (
        ("init", "--quiet", "--initial-branch=main"),
        ("add", "."),
        ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "catalog"),
    ):
        subprocess.run(["git", "-C", origin, *command], check=True)
    instead = tmp_path / "gitconfig"
    upstream = "https://github.com/bentoml/openllm-models"
    instead.write_text(f'[url "file://{origin}"]\n\tinsteadOf = {upstream}\n')
    (tmp_path / "tmp").mkdir()
    done = preload(MODEL=TAG, GIT_CONFIG_GLOBAL=str(instead), TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"openllm:tiny:1b is Tripod/Tiny@{commit}")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / ".openllm").exists()


def test_openllm_gets_no_secret_and_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    monkeypatch.setenv("API_KEY", "hidden")
    with catalog._environment() as environment:
        assert environment["BENTOML_DO_NOT_TRACK"] == "True"
        assert not any("hidden" in value for value in environment.values())
        assert Path(environment["OPENLLM_HOME"]).is_dir()
    assert not Path(environment["OPENLLM_HOME"]).exists()
