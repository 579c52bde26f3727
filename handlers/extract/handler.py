"""Facts out of a text as JSON of the caller's own schema, checked before they are handed out."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import jsonschema
from pydantic import BaseModel, Field, field_validator

from worker.engines.base import Engine
from worker.job.chunks import text_of
from worker.job.input import parse


class Input(BaseModel):
    """What `job["input"]` is; `schema` is a JSON schema."""

    text: str = Field(min_length=1)
    wanted: dict[str, Any] = Field(alias="schema")

    @field_validator("wanted")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"it is no JSON schema: {error.message}") from None
        return schema


async def handler(job: dict[str, Any], engine: Engine) -> AsyncGenerator[dict[str, Any], None]:
    """Yields `{"data": …}`, or fails the job where the model ran out of tokens in mid-object."""
    given: Input = job["input"]
    task = f"Answer with the facts of this text as JSON:\n\n{given.text}"
    answer_format = {"type": "json_schema", "json_schema": {"schema": given.wanted}}
    options = {"max_tokens": 1000, "temperature": 0, "response_format": answer_format}
    request = parse({"messages": [{"role": "user", "content": task}], "options": options})
    answer = await text_of(engine.generate(request))
    try:
        data = json.loads(answer)
        jsonschema.validate(data, given.wanted)
    except (ValueError, jsonschema.ValidationError) as error:
        yield {"error": f"the model's answer is not what the schema asks for: {error.args[0]}"}
        return
    yield {"data": data}
