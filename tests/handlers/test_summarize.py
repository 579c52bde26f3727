"""handlers/summarize, without a model."""

import pytest

from worker.errors import BadRequest
from worker.testing import FakeEngine, run

HANDLER = "handlers/summarize"


def test_the_summary_is_made_of_the_key_points() -> None:
    engine = FakeEngine("- a cat\n- a mat", "A cat sits on a mat.")
    chunks = run(HANDLER, {"text": "There was a cat …", "language": "French"}, engine)
    assert "".join(chunk["text"] for chunk in chunks) == "A cat sits on a mat."
    assert chunks[-1]["points"] == "- a cat\n- a mat"
    first, second = (request.messages[0]["content"] for request in engine.requests)
    assert "There was a cat" in first
    assert "in French" in second
    assert "- a mat" in second


def test_its_input_is_checked() -> None:
    with pytest.raises(BadRequest, match="words: 5 is not allowed; it must be greater than"):
        run(HANDLER, {"text": "x", "words": 5}, FakeEngine())
