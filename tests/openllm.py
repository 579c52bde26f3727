"""The real `openllm`, and small catalogs for it in the layout of its own."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT

PROGRAM = ROOT / ".cache" / "openllm" / "bin" / "openllm"


def install() -> None:
    """Have it in the environment of its own; nothing happens when it is there."""
    subprocess.run(["sh", ROOT / "requirements" / "openllm.sh"], check=True, timeout=280)


SERVICE = """\
import os, typing, bentoml, pydantic

raise RuntimeError("a catalog is read, not run")


class Other(pydantic.BaseModel):
    max_num_seqs: int = 1


class BentoArgs(pydantic.BaseModel):
    openllm_model_id: str = {model_id!r}
    openllm_max_tokens: int = pydantic.Field(default_factory=lambda: int(os.environ["MAX_TOKENS"]))
    task: str = pydantic.Field(default_factory=lambda: os.environ.get("TASK", "generate"))
{fields}

    @pydantic.model_serializer
    def serialize(self) -> dict[str, typing.Any]:
        return {{}}


bento_args = bentoml.use_arguments(BentoArgs)
"""


@dataclass
class Catalog:
    """A checkout of a catalog; `make_aliases` does what `openllm repo update` does."""

    folder: Path
    aliases: dict[Path, str] = field(default_factory=dict)

    def add(
        self,
        name: str,
        version: str,
        *,
        alias: str = "",
        model_id: str,
        revision: str,
        arguments: dict[str, Any],
        gpu: tuple[int, str] = (1, "nvidia-l4"),
        excludes: tuple[str, ...] = (),
        token: bool = False,
    ) -> None:
        entry = self.folder / "bentoml" / "bentos" / name / version
        (entry / "src").mkdir(parents=True)
        if alias:
            self.aliases[entry.parent / alias] = version
        metadata = {
            "model_id": model_id.lower(),
            "revision": revision,
            "endpoint": "https://hub.example",
            "include": None,
            "exclude": ["*.pth", "*.pt", "original/**/*", *excludes],
        }
        service = {
            "name": name,
            "models": [{"tag": "m:1", "registry": "huggingface", "metadata": metadata}],
            "config": {"name": name, "resources": {"gpu": gpu[0], "gpu_type": gpu[1]}},
        }
        bento = {
            "service": "service:LLM",
            "name": name,
            "version": version,
            "labels": {"generator": "openllm", "aliases": alias},
            "models": [],
            "services": [service],
            "envs": [
                *([{"name": "HF_TOKEN", "value": ""}] if token else []),
                {"name": "VLLM_USE_V1", "value": "1"},
            ],
            "schema": {"name": name, "type": "service", "routes": []},
            "spec": 2,
            "image": {"python_version": "3.11", "commands": []},
        }
        (entry / "bento.yaml").write_text(yaml.safe_dump(bento, sort_keys=False))
        fields = "\n".join(f"    {key}: object = {value!r}" for key, value in arguments.items())
        source = SERVICE.format(model_id=model_id, fields=fields)
        (entry / "src" / "service.py").write_text(source)

    def make_aliases(self) -> None:
        for path, version in self.aliases.items():
            path.write_text(version)


def catalog_of_tiny(folder: Path, revision: str, **arguments: Any) -> Catalog:
    """Tripod/Tiny at `revision` as tiny:1b, with engine settings as the real entries have them."""
    catalog = Catalog(folder)
    settings: dict[str, Any] = {
        "disable_log_requests": True,
        "max_log_len": 1000,
        "request_logger": None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enable_tool_call_parser": True,
        "enable_reasoning": True,
        "tensor_parallel_size": 1,
    }
    catalog.add(
        "tiny",
        "1b-instruct-c0de",
        alias="1b",
        model_id="Tripod/Tiny",
        revision=revision,
        arguments=settings | arguments,
        excludes=("consolidated*",),
    )
    return catalog


BENTO = ROOT / "tests" / "engines" / "servers" / "bento"
HOME = ROOT / ".cache" / "openllm-home"
"""Where `openllm` installs what a bento needs: once for all runs."""


def own_bento(folder: Path, **arguments: str) -> Path:
    """That bento in a repository of OpenLLM below `folder`, as `bentoml build --arg` leaves it."""
    bento = folder / "bentoml" / "bentos" / "tiny" / "1"
    (bento / "src").mkdir(parents=True)
    (bento / "env" / "python").mkdir(parents=True)
    shutil.copy2(BENTO / "service.py", bento / "src")
    shutil.copy2(BENTO / "requirements.txt", bento / "env" / "python")
    described = yaml.safe_load((BENTO / "bento.yaml").read_text())
    (bento / "bento.yaml").write_text(yaml.safe_dump(described | {"args": arguments}))
    return bento
