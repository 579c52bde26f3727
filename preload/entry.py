"""An entry of OpenLLM's catalog."""

from pydantic import BaseModel, ConfigDict, JsonValue


class Entry(BaseModel):
    """What the catalog says of a tag.

    `bento` is the entry's full name, of which `tag` may be an alias; `gpu` the class of GPU it
    is meant for, `gpus` how many of them; `engine_args` vLLM's options of the spring of 2025.
    """

    model_config = ConfigDict(frozen=True)

    tag: str
    bento: str
    repository: str
    revision: str | None
    excludes: list[str]
    needs_token: bool
    gpu: str | None
    gpus: int
    engine_args: dict[str, JsonValue]

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        gpu = f", meant for {self.gpus} x {self.gpu}" if self.gpu else ""
        token = ", needs HF_TOKEN" if self.needs_token else ""
        return f"{self.repository}{at}{gpu}{token}"
