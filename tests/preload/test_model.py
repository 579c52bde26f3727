"""The MODEL string."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preload.manifest import folder_name
from preload.model import Model, ModelNameError, parse


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/name", Model(repository="org/name")),
        (" gpt2 ", Model(repository="gpt2")),
        ("org/name@v1", Model(repository="org/name", revision="v1")),
        ("org/name@refs/pr/3", Model(repository="org/name", revision="refs/pr/3")),
        ("org/name:Q4_K_M", Model(repository="org/name", gguf="Q4_K_M")),
        ("org/name@v1:iq2_xs", Model(repository="org/name", revision="v1", gguf="iq2_xs")),
        ("org/name:a/b.Q8_0.gguf", Model(repository="org/name", gguf="a/b.Q8_0.gguf")),
        ("openllm:llama3.2:1b", Model(openllm="llama3.2:1b")),
        ("openllm:phi4", Model(openllm="phi4")),
        ("/some/where", Model(folder=Path("/some/where"))),
        ("/some/model.gguf", Model(folder=Path("/some"), gguf="model.gguf")),
    ],
)
def test_names(text: str, model: Model) -> None:
    assert parse(text) == model
    assert parse(str(model)) == model


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("org/name").repository == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    assert parse("org/name").folder == tmp_path / "org" / "name"


def test_revision_beside_the_model() -> None:
    assert parse("org/name", "v1") == parse("org/name@v1", "v1") == parse("org/name@v1")
    assert parse("org/name:Q4_0", "v1") == parse("org/name@v1:Q4_0")


@pytest.mark.parametrize(
    ("text", "revision", "said"),
    [
        ("", "", "must be a hub id"),
        ("org/name/more", "", "must be a hub id"),
        ("org/na me", "", "must be a hub id"),
        ("org--name", "", "must be a hub id"),
        ("org/../name", "", "must be a hub id"),
        ("org/name@", "", "must be a hub id"),
        ("org/name@../x", "", "must be a hub id"),
        ("org/name:", "", "must be a hub id"),
        ("org/name:latest", "", "must be a hub id"),
        ("org/name:../x.gguf", "", "must be a hub id"),
        ("openllm:", "", "must be openllm:<tag>"),
        ("openllm:a/../b", "", "must be openllm:<tag>"),
        ("openllm:--repo", "", "must be openllm:<tag>"),
        ("openllm:llama3.2:*", "", "must be openllm:<tag>"),
        ("openllm:llama3.2:1b", "v1", "unset MODEL_REVISION=v1"),
        ("org/name@v1", "v2", "names v1, but MODEL_REVISION=v2"),
        ("org/name", "a b", "MODEL_REVISION=a b must be a branch"),
        ("/folder", "v1", "a local model has no MODEL_REVISION=v1"),
    ],
)
def test_what_names_nothing(text: str, revision: str, said: str) -> None:
    with pytest.raises(ModelNameError, match=said):
        parse(text, revision)


@given(st.text(max_size=40), st.text(max_size=20))
def test_whatever_is_accepted_stays_in_its_folder(text: str, revision: str) -> None:
    try:
        model = parse(text, revision)
    except ModelNameError:
        return
    if model.repository or model.openllm:
        assert parse(str(model)) == model
        name = folder_name(model)
        assert "/" not in name
        assert not name.startswith(".")
