"""Which files of a repository are fetched."""

from dataclasses import dataclass

import pytest

from preload import choose
from preload.errors import WeightsError


@dataclass(frozen=True)
class Named:
    path: str


def chosen(paths: str, gguf: str | None = None) -> str:
    files = choose.files([Named(path) for path in paths.split()], gguf)
    return " ".join(file.path for file in files)


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        ("model.safetensors pytorch_model.bin config.json", "model.safetensors config.json"),
        ("model.safetensors consolidated.safetensors", "model.safetensors"),
        (
            "mlc-chat-config.json tensor-cache.json params_shard_0.bin params_shard_1.bin a.so b",
            "mlc-chat-config.json tensor-cache.json params_shard_0.bin params_shard_1.bin a.so",
        ),
        ("consolidated.safetensors params.json", "consolidated.safetensors params.json"),
        (
            "model-1-of-2.safetensors model-2-of-2.safetensors mtp.safetensors "
            "model.safetensors.index.json consolidated.safetensors.index.json",
            "model-1-of-2.safetensors model-2-of-2.safetensors mtp.safetensors "
            "model.safetensors.index.json",
        ),
        (
            "pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin training_args.bin "
            "pytorch_model.bin.index.json consolidated.00.pth",
            "pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin "
            "pytorch_model.bin.index.json",
        ),
        (
            "model.safetensors 1_Pooling/config.json 2_Dense/model.safetensors onnx/model.onnx "
            "openvino/config.json original/params.json",
            "model.safetensors 1_Pooling/config.json 2_Dense/model.safetensors",
        ),
        (
            "model.safetensors additional_chat_templates/tools.jinja qwen.tiktoken merges.txt "
            "logo.png README.md tokenizer.model .gitattributes manifest.json",
            "model.safetensors additional_chat_templates/tools.jinja qwen.tiktoken merges.txt "
            "tokenizer.model",
        ),
    ],
)
def test_one_set_of_weights(there: str, fetched: str) -> None:
    assert chosen(there) == fetched


@pytest.mark.parametrize(
    ("wanted", "fetched"),
    [
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q8_0", "Q8_0/m-Q8_0-00001-of-00002.gguf Q8_0/m-Q8_0-00002-of-00002.gguf"),
        (
            "Q8_0/m-Q8_0-00001-of-00002.gguf",
            "Q8_0/m-Q8_0-00001-of-00002.gguf Q8_0/m-Q8_0-00002-of-00002.gguf",
        ),
        ("mmproj-F16.gguf", "mmproj-F16.gguf"),
    ],
)
def test_one_gguf_file(wanted: str, fetched: str) -> None:
    there = (
        "m-Q4_K_M.gguf m-Q4_K_S.gguf m-IQ4_K_M.gguf mmproj-F16.gguf "
        "Q8_0/m-Q8_0-00001-of-00002.gguf Q8_0/m-Q8_0-00002-of-00002.gguf"
    )
    assert chosen(there, wanted) == fetched


@pytest.mark.parametrize(
    ("there", "wanted", "said"),
    [
        ("config.json a.pth", None, "neither .*safetensors nor pytorch_model"),
        ("config.json m-Q4_0.gguf", None, "only GGUF files are there; .*: m-Q4_0.gguf"),
        ("a-Q4_0.gguf b-Q4_0.gguf", "Q4_0", "Q4_0 fits a-Q4_0.gguf, b-Q4_0.gguf; name one"),
        ("m-Q4_0.gguf mmproj-F16.gguf", "F16", "fits F16; there are m-Q4_0.gguf"),
        (
            "m-Q8_0-00001-of-00003.gguf m-Q8_0-00003-of-00003.gguf",
            "Q8_0",
            "only 2 of the 3 parts of m-Q8_0.gguf are there",
        ),
        ("model.safetensors", "Q4_0", "fits Q4_0; there are none"),
    ],
)
def test_no_weights(there: str, wanted: str | None, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        chosen(there, wanted)
