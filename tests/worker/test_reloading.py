"""A handler that is read anew: edits count, what `setup` made stays, what is broken is told."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from worker import loading
from worker.engines.base import Engine
from worker.reloading import Reloading
from worker.testing import FakeEngine

CODE = """
import voice_of_it
calls = {}
tool = None
PROMPT = "old"

async def setup(engine):
    global tool
    tool = object()
    calls["setup"] = calls.get("setup", 0) + 1
    voice_of_it.loaded = "by setup"

async def handler(job, engine):
    yield [PROMPT, voice_of_it.NAME, calls["setup"], tool is not None, voice_of_it.loaded]
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = list(sys.path)
    (tmp_path / "voice_of_it.py").write_text("NAME = 'old'\nloaded = None\n")
    (tmp_path / "reloaded.py").write_text(CODE)
    yield tmp_path / "reloaded.py"
    sys.path[:] = path
    for name in ("reloaded", "voice_of_it"):
        sys.modules.pop(name, None)


def edit(file: Path, code: str) -> None:
    file.write_text(code)


async def answer(loaded: Reloading) -> list[Any]:
    engine = cast(Engine, FakeEngine())
    return [chunk async for chunk in loaded.handler.answer({"id": "x", "input": {}}, engine)]


async def test_edits_count_and_what_setup_made_stays(file: Path) -> None:
    loaded = Reloading(str(file))
    await loaded.handler.set_up(cast(Engine, FakeEngine()))
    loaded.remember_setup()
    assert await answer(loaded) == [["old", "old", 1, True, "by setup"]]

    edit(file, CODE.replace('PROMPT = "old"', 'PROMPT = "edited"'))
    edit(file.parent / "voice_of_it.py", "NAME = 'edited too'\nloaded = None\n")
    assert loaded.again()
    assert await answer(loaded) == [["edited", "edited too", 1, True, "by setup"]]
    assert loaded.again()
    assert await answer(loaded) == [["edited", "edited too", 1, True, "by setup"]]


async def test_what_does_not_load_leaves_the_old_in_place(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = Reloading(str(file))
    await loaded.handler.set_up(cast(Engine, FakeEngine()))
    loaded.remember_setup()
    edit(file, CODE + "\nthis is no Python\n")
    assert not loaded.again()
    [told] = [record.getMessage() for record in caplog.records]
    assert f"{file}:16: SyntaxError" in told
    assert told.endswith("; mend it and try again")
    assert await answer(loaded) == [["old", "old", 1, True, "by setup"]]

    edit(file, CODE.replace('"old"', '"mended"'))
    assert loaded.again()
    assert await answer(loaded) == [["mended", "old", 1, True, "by setup"]]


async def test_modules_of_other_places_are_not_read_anew(file: Path) -> None:
    loaded = Reloading(str(file))
    assert set(loading.modules_of(loaded.handler)) == {"reloaded", "voice_of_it"}
