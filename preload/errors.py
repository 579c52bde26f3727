"""What can go wrong on the way to a model's weights.

WeightsError           the model is nowhere to be had
├── HubUnreachable     no answer from the hub; a copy on this machine may still do
└── Interrupted        told to stop; what was fetched is kept for the next run
"""


class WeightsError(Exception):
    """One sentence: the variable, its value, what is wrong and what to do."""


class HubUnreachable(WeightsError):
    """The hub gives no answer."""


class Interrupted(WeightsError):
    """SIGINT or SIGTERM came while fetching."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text; the name of its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
