"""What is wrong with an input, in one sentence: the field, its value, what is allowed."""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

Path = list[int | str]


def checked(model: type[BaseModel], value: object) -> Any:
    """`value` as an instance of the user's own `model`.

    Raises:
        ValueError: one sentence that names the field, the value and what is allowed.
    """

    def hint(path: Path) -> str:
        close = difflib.get_close_matches(str(path[-1]), model.model_fields, n=1)
        known = ", ".join(model.model_fields)
        return f"did you mean {close[0]}?" if close else f"allowed are {known}"

    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ValueError(sentence(error, hint)) from None


def sentence(error: ValidationError, hint: Callable[[Path], str]) -> str:
    """The first problem, with what each branch of a union would have allowed.

    Args:
        hint: what to write instead of the unknown field at a path.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    path = _path(problem)
    field = shortened(
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    )
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field; {hint(path)}"
    if problem["type"] == "missing":
        return f"{field}: missing; it must be given"
    if problem["type"] in {"value_error", "assertion_error"}:
        return f"{field}: {problem['ctx']['error']}"
    branches = [other for other in problems if _path(other) == path]
    allowed = _or(map(_allowed, branches))
    return f"{field}: {describe(problem['input'])} is not allowed; it must {allowed}"


def describe(value: object) -> str:
    """A short, safe picture of a value for an error message; never more than 80 characters."""
    match value:
        case None:
            return "null"
        case int() if value.bit_length() > 128:
            text = f"a number of {value.bit_length()} bits"
        case bool() | int() | float():
            text = json.dumps(value)
        case str():
            text = json.dumps(value[:60]) + (f"… ({len(value)} characters)" if value[60:] else "")
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {len(value)} keys"
        case _:
            return f"a {type(value).__name__}"
    return text


def _path(problem: Any) -> Path:
    """Where the problem is, without the branches of unions that pydantic names in between."""
    *parents, last = problem["loc"] or ("input",)
    path = [part for part in parents if not _is_branch(part)]
    if path and _is_branch(last) and problem["type"] != "extra_forbidden":
        return path
    return [*path, last]


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (
        part in {"str", "int", "float"} or any(mark in part for mark in "[(-")
    )


def _or(demands: Iterable[str]) -> str:
    """`be a text`, `be a list` → `be a text or a list`."""
    first, *rest = dict.fromkeys(demands)
    return " or ".join([first, *(demand.removeprefix("be ") for demand in rest)])


def _allowed(problem: Any) -> str:
    """What follows "it must"."""
    match problem["type"]:
        case "too_short":
            return f"be at least {problem['ctx']['min_length']} of them"
        case "too_long":
            return f"be at most {problem['ctx']['max_length']} of them"
        case kind if kind in KINDS:
            return f"be {KINDS[kind]}"
    message = str(problem["msg"])
    demand = re.match(r"\w+ should (?:(?:be|have) )?", message)
    if demand is None:
        return f"be another: {message[:1].lower()}{message[1:]}"
    asked = message[demand.end() :]
    return asked if demand[0].endswith("should ") else f"be {asked}"


KINDS = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}
"""pydantic's names of what a field may hold → ours."""


def shortened(path: str) -> str:
    """A path of at most some 80 characters."""
    return path if len(path) <= 80 else f"{path[:40]}…{path[-30:]}"
