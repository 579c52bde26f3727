"""Where a model is found at run time: in which order, and what is passed over."""

import json
import shutil
from pathlib import Path

import pytest

from preload.errors import WeightsError
from preload.manifest import folder_name
from preload.model import parse
from preload.weights import Places, find
from tests.preload.conftest import BIG, NEEDED, Preload, make_model
from tests.preload.hub import Running

WHOLE = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(
        baked=tmp_path / "baked",
        runpod_cache=tmp_path / "volume" / "huggingface-cache" / "hub",
        volumes=(tmp_path / "volume", tmp_path / "workspace"),
        hub_cache=tmp_path / "cache",
    )


def bake(places: Places, text: str, commit: str = "c" * 40) -> Path:
    """What `python -m preload` leaves, made by hand."""
    model = parse(text)
    folder = make_model(places.baked / folder_name(model), WHOLE)
    files = [{"path": name, "size": 1000, "sha256": "0" * 64} for name in sorted(WHOLE)]
    (folder / "config.json").write_bytes(bytes(1000))
    manifest = {
        "model": text,
        "repository": model.repository,
        "revision": model.revision,
        "commit": commit,
        "gguf": model.gguf,
        "files": files,
        "total_size": 3000,
        "tokenizer": ["tokenizer.json"],
        "created_by": "the test",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def snapshot(cache: Path, folder: str, commit: str, ref: str | None = "main") -> Path:
    """A model in the layout of huggingface_hub's cache."""
    if ref:
        (cache / folder / "refs").mkdir(parents=True, exist_ok=True)
        (cache / folder / "refs" / ref).write_text(commit)
    return make_model(cache / folder / "snapshots" / commit, WHOLE)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks the hub fails."""

    def asked(model: object, token: object) -> None:
        raise WeightsError("the hub was asked")

    monkeypatch.setattr("preload.hub.listing", asked)


@pytest.mark.usefixtures("nowhere")
def test_search_order(places: Places) -> None:
    model = parse("org/name")
    found = [
        (bake(places, "org/name"), "is baked into this image"),
        (snapshot(places.runpod_cache, "models--org--name", "a" * 40), "in Runpod's model cache"),
        (make_model(places.volumes[0] / "models/org/name", WHOLE), "on the network volume"),
        (make_model(places.volumes[1] / "org/name", WHOLE), "on the network volume"),
    ]
    for folder, why in found:
        weights = find(model, places=places)
        assert weights.folder == folder
        assert weights.why.startswith(f"{folder}: org/name is ")
        assert why in weights.why
        shutil.rmtree(folder)
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(model, places=places)


@pytest.mark.parametrize(
    ("baked", "asked"),
    [
        ("org/name", "org/name"),
        ("org/name", "Org/Name"),
        ("org/name", "org/name@main"),
        ("org/name@main", "org/name"),
        ("org/name@v1", "org/name@v1"),
        ("org/name", f"org/name@{'c' * 40}"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_baked_is_what_is_asked_for(places: Places, baked: str, asked: str) -> None:
    folder = bake(places, baked)
    assert find(parse(asked), places=places).folder == folder


@pytest.mark.parametrize(
    ("baked", "asked"),
    [
        ("org/name@v1", "org/name"),
        ("org/name", "org/name@v1"),
        ("org/name", "org/name-two"),
        ("org/name", "name"),
        ("org/name:Q4_0", "org/name"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_baked_is_something_else(places: Places, baked: str, asked: str) -> None:
    bake(places, baked)
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse(asked), places=places)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
            "model.safetensors has 4 bytes instead of 1000",
        ),
        (lambda folder: folder.rename(folder.with_name(".partial-org--name-abc")), None),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_half_written_is_passed_over(
    places: Places, caplog: pytest.LogCaptureFixture, damage: object, said: str | None
) -> None:
    damage(bake(places, "org/name"))  # type: ignore[operator]
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse("org/name"), places=places)
    assert said is None or said in caplog.text


@pytest.mark.usefixtures("nowhere")
def test_runpod_cache_in_lower_case(places: Places) -> None:
    cache = places.runpod_cache
    old = snapshot(cache, "models--org--name-7b", "a" * 40, "old")
    new = snapshot(cache, "models--org--name-7b", "b" * 40)
    assert find(parse("Org/Name-7B"), places=places).folder == new
    assert find(parse("Org/Name-7B@old"), places=places).folder == old
    assert find(parse(f"Org/Name-7B@{'a' * 40}"), places=places).folder == old
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse("Org/Name-7B@absent"), places=places)


@pytest.mark.usefixtures("nowhere")
def test_runpod_cache_without_refs(places: Places) -> None:
    only = snapshot(places.runpod_cache, "models--org--name", "a" * 40, ref=None)
    assert find(parse("org/name"), places=places).folder == only
    snapshot(places.runpod_cache, "models--org--name", "b" * 40, ref=None)
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse("org/name"), places=places)


@pytest.mark.usefixtures("nowhere")
def test_a_cache_that_lacks_a_shard_is_passed_over(places: Places) -> None:
    folder = places.runpod_cache / "models--org--name" / "snapshots" / ("a" * 40)
    make_model(folder, NEEDED - {BIG})
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse("org/name"), places=places)
    (folder / BIG).touch()
    assert find(parse("org/name"), places=places).folder == folder


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (None, "there is no such folder"),
        ({"model.safetensors"}, "the folder holds no config.json"),
        ({"config.json"}, "the folder holds neither"),
        (NEEDED - {BIG}, f"{BIG} is missing, which model.safetensors.index.json names"),
    ],
)
def test_a_local_folder_that_is_not_whole(
    tmp_path: Path, names: set[str] | None, said: str
) -> None:
    folder = tmp_path / "model"
    if names is not None:
        make_model(folder, names)
    with pytest.raises(WeightsError) as error:
        find(parse(str(folder)))
    assert str(error.value).startswith(f"MODEL={folder}: {said}")


def test_a_local_folder(tmp_path: Path) -> None:
    folder = make_model(tmp_path, WHOLE)
    assert find(parse(str(folder))).why == f"{folder}: MODEL names this folder"


SPLIT = {f"Q8_0/m-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)}
GGUF = {"m-Q4_K_M.gguf", "mmproj-F16.gguf", "config.json", *SPLIT}


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q8_0", "Q8_0/m-Q8_0-00001-of-00002.gguf"),
        ("Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_a_gguf_is_searched_for_in_the_same_places(places: Places, wanted: str, first: str) -> None:
    model = parse(f"org/name:{wanted}")
    cached = places.runpod_cache / "models--org--name" / "snapshots" / ("a" * 40)
    for folder, why in (
        (make_model(cached, GGUF), "is in Runpod's model cache"),
        (make_model(places.volumes[0] / "models/org/name", GGUF), "is on the network volume"),
        (make_model(places.volumes[1] / "org/name", GGUF), "is on the network volume"),
    ):
        found = find(model, places=places)
        assert found.gguf == folder / first
        assert found.why == f"{found.gguf}: {model} {why}"
        shutil.rmtree(folder)
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(model, places=places)


@pytest.mark.usefixtures("nowhere")
def test_a_gguf_that_lacks_a_part_is_passed_over(places: Places) -> None:
    folder = places.volumes[0] / "org/name"
    make_model(folder, GGUF - {max(SPLIT)})
    with pytest.raises(WeightsError, match="the hub was asked"):
        find(parse("org/name:Q8_0"), places=places)
    (folder / max(SPLIT)).touch()
    assert find(parse("org/name:Q8_0"), places=places).gguf == folder / min(SPLIT)


def test_a_local_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, GGUF)
    file = tmp_path / "m-Q4_K_M.gguf"
    assert find(parse(str(file))).gguf == file
    assert find(parse(str(file))).why == f"{file}: MODEL names this file"
    for name in SPLIT:
        assert find(parse(str(tmp_path / name))).gguf == tmp_path / min(SPLIT)
    monkeypatch.chdir(tmp_path)
    assert find(parse("m-Q4_K_M.gguf")).gguf == file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent/m.gguf", "there is no such folder"),
        ("m-Q5_0.gguf", "no GGUF file there fits m-Q5_0.gguf; there are m-Q4_K_M.gguf"),
        (min(SPLIT), "only 1 of the 2 parts of m-Q8_0.gguf are there"),
    ],
)
def test_a_local_gguf_that_is_not_whole(tmp_path: Path, name: str, said: str) -> None:
    make_model(tmp_path, GGUF - {max(SPLIT)})
    with pytest.raises(WeightsError) as error:
        find(parse(str(tmp_path / name)))
    assert str(error.value) == f"MODEL={tmp_path / name}: {said}"


FIND = """
import logging, sys
from pathlib import Path
from preload import model, weights
from preload.errors import WeightsError
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
places = weights.Places(Path("models"), Path("absent"), (Path("absent"),))
try:
    found = weights.find(model.parse({name!r}), token={token!r}, places=places)
except WeightsError as error:
    sys.exit(f"refused: {{error}}")
print(found.why)
"""


def test_what_preload_baked_is_used_offline(preload: Preload) -> None:
    assert preload().returncode == 0
    found = preload.python(
        FIND.format(name="org/tiny", token=None), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://x.invalid"
    )
    assert found.stdout == "models/org--tiny: org/tiny is baked into this image\n"


def test_a_split_gguf_baked_and_used_offline(
    preload: Preload, served: Running, tmp_path: Path
) -> None:
    served.hub.add("org/split", make_model(tmp_path / "split", GGUF))
    assert preload(MODEL="org/split:Q8_0").returncode == 0
    assert set(served.hub.requests) == {"config.json", *SPLIT}
    found = preload.python(
        FIND.format(name="org/split:Q8_0", token=None), HF_HUB_OFFLINE="1", HF_ENDPOINT="x"
    )
    folder = "models/org--split--Q8_0"
    assert found.stdout == f"{folder}/{min(SPLIT)}: org/split:Q8_0 is baked into this image\n"


def test_a_gguf_downloaded_at_run_time(preload: Preload, served: Running, tmp_path: Path) -> None:
    served.hub.add("org/split", make_model(tmp_path / "split", GGUF))
    code = FIND.format(name="org/split:q8_0", token=None)
    first = preload.python(code).stdout.splitlines()[-1]
    assert first.endswith(
        f"/{min(SPLIT)}: org/split:q8_0 comes from the hub; it was on no local disk"
    )
    assert set(served.hub.sent) == {"config.json", *SPLIT}
    served.hub.sent.clear()
    assert "as the hub has it now" in preload.python(code).stdout
    assert not served.hub.sent


def test_download_at_run_time(preload: Preload, served: Running, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", WHOLE | {"README.md", "pytorch_model.bin"})
    served.hub.add("org/other", other)
    preload()
    served.hub.sent.clear()
    code = FIND.format(name="org/other", token=None)

    first = preload.python(code)
    warning, why = first.stdout.splitlines()
    size = sum((other / name).stat().st_size for name in WHOLE) / 1000
    assert warning == (
        "WARNING MODEL=org/other is not what this image holds (baked: org/tiny): "
        f"a download of {size:.1f} kB follows"
    )
    assert why.endswith(": org/other comes from the hub; it was on no local disk")
    assert set(served.hub.sent) == WHOLE
    folder = Path(why.partition(": ")[0])
    assert folder.is_relative_to(preload.home / ".cache" / "huggingface")

    served.hub.sent.clear()
    second = preload.python(code)
    assert second.stdout == (
        f"{folder}: org/other is in the Hugging Face cache of this machine, as the hub has it now\n"
    )
    assert not served.hub.sent

    third = preload.python(code, HF_ENDPOINT="http://127.0.0.1:9")
    assert third.stdout == (
        f"{folder}: org/other is in the Hugging Face cache of this machine, "
        "and the hub can't be reached\n"
    )


def test_refusals_at_run_time(preload: Preload) -> None:
    def refusal(name: str, token: str | None = None) -> str:
        done = preload.python(FIND.format(name=name, token=token))
        assert done.returncode == 1
        return done.stderr

    assert "MODEL=org/absent: the hub knows no such repository" in refusal("org/absent")
    assert "MODEL=org/closed: this repository is gated; set HF_TOKEN" in refusal("org/closed")
    assert "the hub refuses HF_TOKEN as invalid" in refusal("org/tiny", "hf_wrong")


def test_download_where_nothing_is_baked(preload: Preload) -> None:
    found = preload.python(FIND.format(name="org/tiny@v1", token="hf_right"))
    assert found.stdout.startswith(
        "WARNING MODEL=org/tiny@v1 is neither baked into this image nor on any disk here: "
        "a download of 25.2 MB follows\n"
    )


def test_run_time_download_that_does_not_fit(preload: Preload, served: Running) -> None:
    full = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1000)"
    done = preload.python(full + FIND.format(name="org/tiny", token=None))
    assert "not enough disk: 25.2 MB are still to be fetched" in done.stderr
    assert not served.hub.requests
