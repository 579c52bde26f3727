"""What the head of a GGUF file says about the model: enough to size its KV cache."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from preload.weights import gguf_parts
from worker.errors import EngineStartError

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""GGUF's value types → struct's letters; all little-endian."""

STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Head:
    """Tokens that the model was trained for, bytes of KV cache a token (16-bit), bytes on disk."""

    context: int
    kv_bytes: int
    file_bytes: int


def read(path: Path) -> Head:
    """Read the head of `path`, the first part where a model is split into several.

    Raises:
        EngineStartError: it is no GGUF file.
    """
    try:
        with path.open("rb") as file:
            values = _architecture(file)
        context = int(values["context_length"])
        heads = values.get("attention.head_count", 1)
        kv_heads = values.get("attention.head_count_kv", heads)
        layers = int(values["block_count"])
        own = int(values["embedding_length"]) // max(_list(heads, 1))
        width = values.get("attention.key_length", own) + values.get("attention.value_length", own)
        kv_bytes = 2 * width * sum(_list(kv_heads, layers))
    except (OSError, KeyError, TypeError, ValueError, struct.error, ZeroDivisionError) as error:
        raise EngineStartError(f"{path}: the file is no whole GGUF model: {error!r}") from None
    parts = gguf_parts(path.parent, path.name)
    return Head(context, kv_bytes, sum(part.stat().st_size for part in parts))


def _list(value: Any, length: int) -> list[int]:
    """A number for each layer; most models give one for all."""
    return value if isinstance(value, list) else [int(value)] * length


def _architecture(file: BinaryIO) -> dict[str, Any]:
    """The values of the model's architecture, without its prefix; the tokenizer follows them."""
    magic, version, _tensors, count = _unpack(file, "4sIQQ")
    if magic != b"GGUF" or version < 2:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    found: dict[str, Any] = {}
    for _ in range(count):
        key = _string(file)
        if key.startswith("tokenizer.") and any(name.endswith(".context_length") for name in found):
            break  # its lists are long, and they follow in every file that converters write
        found[key] = _value(file, *_unpack(file, "I"))
    prefix = f"{found.get('general.architecture')}."
    return {
        key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)
    }


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        of, length = _unpack(file, "IQ")
        return [_value(file, of) for _ in range(length)]
    [value] = _unpack(file, SCALARS[kind])
    return value


def _string(file: BinaryIO) -> str:
    [length] = _unpack(file, "Q")
    if length > 1 << 24:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode("utf-8", "replace")


def _unpack(file: BinaryIO, letters: str) -> tuple[Any, ...]:
    layout = struct.Struct("<" + letters)
    return layout.unpack(file.read(layout.size))
