"""Which files of a repository inference needs."""

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from preload.errors import WeightsError

SMALL = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",  # the pooling and dense layers of an embedding model
    "[0-9]_*/model.safetensors",
)
NEVER = ("*.bin.index.json", "*.h5.index.json", "*.safetensors.index.json", "manifest.json")
TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.tiktoken",
    "*.model",
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""In the order in which vLLM looks for them."""

MODEL_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SHARD = re.compile(r"-\d{5}-of-(?P<parts>\d{5})(?=\.gguf$)", re.IGNORECASE)


class Named(Protocol):
    """Anything with a `path` in a repository, its parts divided by `/`."""

    @property
    def path(self) -> str: ...


File = TypeVar("File", bound=Named)


def files(
    listing: Sequence[File], gguf: str | None = None, excludes: Sequence[str] = ()
) -> list[File]:
    """What to fetch of `listing`: one set of weights, and what goes with it.

    Safetensors are preferred, then `pytorch_model*.bin`; copies in other formats and folders
    are left out. With `gguf`, the weights are that one file (all its parts if it is split).
    What one of the patterns in `excludes` fits is not there; in these `*` stops nowhere.

    Raises:
        WeightsError: there are no weights here that can be used, or `gguf` is not one file.
    """
    listing = [
        file for file in listing if not any(fnmatchcase(file.path, each) for each in excludes)
    ]
    if gguf:
        parts = gguf_parts([file.path for file in listing], gguf)
        weights = [file for file in listing if file.path in parts]
    else:
        weights = _safetensors(listing) or _torch(listing) or _mlc(listing)
    if not weights:
        raise WeightsError(_nothing_usable(listing))
    indexes = {f"{_stem(file.path)}.index.json" for file in weights}
    return [
        file
        for file in listing
        if file in weights
        or file.path in indexes
        or (_matches(file.path, SMALL) and not _matches(file.path, NEVER))
    ]


def adapter_files(listing: Sequence[File]) -> list[File]:
    """What to fetch of a LoRA adapter: its configuration, its weights, and their license.

    Raises:
        WeightsError: it is none.
    """
    paths = {file.path for file in listing}
    weights = next((name for name in ADAPTER_WEIGHTS if name in paths), None)
    if ADAPTER_CONFIG not in paths or weights is None:
        raise WeightsError(no_adapter(ADAPTER_CONFIG in paths))
    wanted = (ADAPTER_CONFIG, weights, "LICENSE*", "NOTICE*")
    return [file for file in listing if _matches(file.path, wanted)]


def no_adapter(configured: bool) -> str:
    """What is said of a place without an adapter's configuration, or with nothing but that."""
    if configured:
        return f"it holds none of {', '.join(ADAPTER_WEIGHTS)}"
    return f"it holds no {ADAPTER_CONFIG}, so it is no LoRA adapter"


def is_adapter(paths: Collection[str]) -> bool:
    """Whether these are the files of a LoRA adapter, and of no model beside it."""
    weights = any(_matches(path, MODEL_WEIGHTS) and path not in ADAPTER_WEIGHTS for path in paths)
    return ADAPTER_CONFIG in paths and not ("config.json" in paths and weights)


def gguf_parts(paths: Iterable[str], wanted: str) -> list[str]:
    """Which of `paths` are the GGUF file `wanted`: one path, or all its parts in their order.

    Raises:
        WeightsError: none fits, more than one does, or a part is missing.
    """
    every = sorted(path for path in paths if path.lower().endswith(".gguf"))
    models = [path for path in every if "mmproj" not in path.lower()]
    if wanted.lower().endswith(".gguf"):
        chosen = [path for path in every if _whole(path) == _whole(wanted)]
    else:
        part = re.compile(rf"(^|[-._/]){re.escape(wanted)}(?=[-._/])", re.IGNORECASE)
        chosen = [path for path in models if part.search(path)]
    names = sorted({_whole(path) for path in chosen})
    if len(names) > 1:
        raise WeightsError(f"{wanted} fits {_list(names)}; name one file after the colon")
    if not names:
        there = sorted({_whole(path) for path in models})
        raise WeightsError(
            f"no GGUF file there fits {wanted}; there are {_list(there) if there else 'none'}"
        )
    if (split := _SHARD.search(chosen[0])) and len(chosen) != int(split["parts"]):
        raise WeightsError(
            f"only {len(chosen)} of the {int(split['parts'])} parts of {names[0]} are there"
        )
    return chosen


def tokenizer(paths: Iterable[str]) -> list[str]:
    """The files of `paths` that the tokenizer and its chat template are read from."""
    return [path for path in paths if _matches(path, TOKENIZER)]


def _mlc(listing: Sequence[File]) -> list[File]:
    """MLC's shards, and the libraries that were compiled for them, if they are there."""
    shards = [file for file in listing if _matches(file.path, ("params_shard_*.bin",))]
    libraries = [file for file in listing if _matches(file.path, ("*.so",))]
    return shards and shards + libraries


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Like a shell: `*` stops at `/`, so that `*.json` means the top level only."""
    return any(
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns
    )


def _stem(path: str) -> str:
    """`model-00001-of-00002.safetensors` → `model.safetensors`, as its index is named."""
    return re.sub(r"-\d+-of-\d+(?=\.\w+$)", "", path)


def _safetensors(listing: Sequence[File]) -> list[File]:
    found = [file for file in listing if _matches(file.path, ("*.safetensors",))]
    if any(file.path.startswith("model") for file in found):
        return [file for file in found if not file.path.startswith("consolidated")]
    return found


def _torch(listing: Sequence[File]) -> list[File]:
    return [file for file in listing if _matches(file.path, ("pytorch_model*.bin",))]


def _whole(path: str) -> str:
    """The name that all parts of a split GGUF file share."""
    return _SHARD.sub("", path)


def _nothing_usable(listing: Sequence[Named]) -> str:
    gguf = sorted({_whole(file.path) for file in listing if file.path.lower().endswith(".gguf")})
    if gguf:
        return f"only GGUF files are there; name one after a colon: {_list(gguf)}"
    return (
        "nothing there can be used: neither *.safetensors nor pytorch_model*.bin nor *.gguf "
        "nor MLC's params_shard_*.bin"
    )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
