"""Which variables are secrets, and an environment without them."""

from collections.abc import Collection, Mapping

SECRETS = frozenset(
    {
        "API_KEY",
        "CLUSTER_TOKEN",
        "ENGINE_API_KEY",
        "HF_TOKEN",
        "JUPYTER_PASSWORD",
        "RUNPOD_AI_API_KEY",
        "RUNPOD_API_KEY",
        "VLLM_API_KEY",
    }
)
"""Names of variables that no program which we start sees unless it needs them."""


def without_secrets(
    environment: Mapping[str, str], *, keep: Collection[str] = ()
) -> dict[str, str]:
    """A copy of `environment` without SECRETS, but with those of them named in `keep`."""
    return {
        name: value for name, value in environment.items() if name in keep or name not in SECRETS
    }
