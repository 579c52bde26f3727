"""handlers/extract, without a model."""

import pytest

from worker.errors import BadRequest, JobFailed
from worker.testing import FakeEngine, run

HANDLER = "handlers/extract"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "born": {"type": "integer"}},
    "required": ["name", "born"],
}
ASKED = {"text": "Ada Lovelace was born in 1815.", "schema": SCHEMA}


def test_what_fits_the_schema_is_the_answer() -> None:
    engine = FakeEngine('{"name": "Ada Lovelace", "born": 1815}')
    assert run(HANDLER, ASKED, engine) == [{"data": {"name": "Ada Lovelace", "born": 1815}}]
    [request] = engine.requests
    assert request.options.response_format.json_schema.schema_ == SCHEMA


@pytest.mark.parametrize("answer", ['{"name": "Ada', '{"name": "Ada", "born": "long ago"}'])
def test_an_answer_that_does_not_fit_fails_the_job(answer: str) -> None:
    with pytest.raises(JobFailed, match="not what the schema asks for"):
        run(HANDLER, ASKED, FakeEngine(answer))


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(BadRequest, match="schema: it is no JSON schema"):
        run(HANDLER, {"text": "x", "schema": {"type": "objekt"}}, FakeEngine())
