"""Names in ENGINE_ARGS, written with dashes or underscores as the user likes."""

import difflib
from collections.abc import Iterable, Mapping, Set


def underscored(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def dashed(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def problems(
    names: Iterable[str], known: Set[str], ours: Mapping[str, str], engine: str
) -> list[str]:
    """One line for each name that is not `known`, or that Tripod sets, by what `ours` says."""
    found = []
    for name in names:
        if name in ours:
            found.append(f"{name} is set by {ours[name]}")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            found.append(f"{engine} has no option {name}{hint}")
    return found
