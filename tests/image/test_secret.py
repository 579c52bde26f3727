"""The token of the hub, looked for everywhere. Sorts last: it reads what the other tests wrote."""

import subprocess

import pytest

from tests.image.conftest import Recipe
from tests.image.engine import Built, Engine

pytestmark = pytest.mark.timeout(900)


def test_the_token_stands_in_no_layer_no_history_and_no_log(
    engine: Engine, bundled: Built, iteration: Built, recipe: Recipe
) -> None:
    """An archive of both images holds each layer once, uncompressed, and the history."""
    token = recipe.token.encode()
    size = 0
    multiple = ["--multi-image-archive"] if engine.name == "podman" else []
    with engine.popen(
        "save", *multiple, bundled.image, iteration.image, stdout=subprocess.PIPE
    ) as saving:
        assert saving.stdout
        end = b""
        while piece := saving.stdout.read(8 << 20):
            assert token not in end + piece
            end = piece[-len(token) :]
            size += len(piece)
    assert saving.returncode == 0
    assert size > engine.inspect(bundled.image)["Size"] * 0.9
    assert "tripod/tiny" in "".join(engine.logs)
    assert not [log for log in engine.logs if recipe.token in log]
    assert recipe.token not in engine("history", "--no-trunc", iteration.image)
