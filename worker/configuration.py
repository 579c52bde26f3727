"""The environment → Settings, with the engine's options checked by the engine."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo, field_validator

from worker import engines, settings
from worker.settings import Settings


class _Checked(Settings):
    @field_validator("engine_args")
    @classmethod
    def _known_to_the_engine(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if not args or not {"engine", "model"} <= info.data.keys():
            return args  # what is wrong is told of those
        engine = engines.chosen(info.data["engine"], info.data["model"])
        if problems := engines.argument_problems(engine, args):
            raise ValueError("; ".join(problems))
        return args


def load(environment: Mapping[str, str]) -> Settings:
    """Read the environment.

    Raises:
        SettingsError: with every problem found, those of the engine's options among them.
    """
    return settings.load(environment, _Checked)
