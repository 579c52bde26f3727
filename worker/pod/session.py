"""What ssh and JupyterLab sessions inherit of the container's environment."""

from collections.abc import Mapping

from preload.secret import without_secrets

NEEDED = {"HF_TOKEN", "RUNPOD_API_KEY"}
"""Secrets that a session does need: to try a gated model, and for `runpodctl`."""

OF_THE_SESSION = {"HOME", "USER", "LOGNAME", "SHELL", "TERM", "PWD", "OLDPWD", "SHLVL", "MAIL", "_"}
"""Variables that a login sets by itself."""


def session_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What sessions inherit: neither the worker's own secrets, nor what a login sets."""
    return {
        name: value
        for name, value in without_secrets(environment, keep=NEEDED).items()
        if name not in OF_THE_SESSION and "\n" not in value
    }
