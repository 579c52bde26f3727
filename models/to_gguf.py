"""A Llama with byte-level BPE, from Hugging Face layout to one GGUF file.

`make setup` makes models/tiny-gguf/tiny-f32.gguf of models/tiny with it. For other models use
llama.cpp's own converter, or a GGUF that somebody publishes.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoConfig


class Type(StrEnum):
    """How the matrices are stored; norms are float32 in each of them."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


STORED = {
    Type.F32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    Type.F16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    Type.Q8_0: (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


class NotSupported(Exception):
    """The model is not what this program knows; one sentence."""


def main(
    source: Annotated[Path, typer.Argument(help="Folder in Hugging Face layout.")],
    target: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type: Annotated[Type, typer.Option(help="Type of the matrices.")] = Type.F32,
) -> None:
    """Convert a Llama with byte-level BPE to GGUF."""
    try:
        convert(source, target, type)
    except NotSupported as error:
        typer.echo(f"{source}: {error}", err=True)
        raise typer.Exit(1) from None


def convert(source: Path, target: Path, type: Type = Type.F32, *, tensors_a_part: int = 0) -> None:
    """Write `target`; with `tensors_a_part` above 0 as parts `…-00001-of-0000N.gguf` beside it.

    Raises:
        NotSupported: the model is another one than a Llama with byte-level BPE.
    """
    config = AutoConfig.from_pretrained(source)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    _check(config, tokenizer)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)

    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, "llama", split_max_tensors=tensors_a_part)
    writer.add_name(source.name)
    writer.add_file_type(STORED[type][1])
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, config)
    template = source / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    _add_tensors(writer, tensors, config, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: Any, tokenizer: dict[str, Any]) -> None:
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise NotSupported(f"this {config.model_type} is no Llama without biases")
    if (rope := config.rope_parameters["rope_type"]) != "default":
        raise NotSupported(f"rope_type={rope}: only default is known here")
    split = tokenizer["pre_tokenizer"]
    if tokenizer["model"]["type"] != "BPE" or not split.get("use_regex"):
        raise NotSupported("its tokenizer is no byte-level BPE that splits as GPT-2's does")


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: Any) -> None:
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    ids |= {content: number for number, content in special.items()}
    names = {number: content for content, number in ids.items()}
    every = range(config.vocab_size)
    # Rows that no token has: there to round up the size of the embedding.
    writer.add_token_list([names.get(number, f"[unused {number}]") for number in every])
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL
            if number in special
            else gguf.TokenType.NORMAL
            if number in names
            else gguf.TokenType.UNUSED
            for number in every
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(config.eos_token_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)


def _add_tensors(
    writer: gguf.GGUFWriter, tensors: dict[str, torch.Tensor], config: Any, type: Type
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for source, tensor in sorted(tensors.items()):
        target = names.get_name(source, try_suffixes=(".weight",))
        if target is None:
            raise NotSupported(f"a Llama has no tensor {source}")
        values = tensor.to(torch.float32).numpy()
        if source.endswith("q_proj.weight"):
            values = _rope_order(values, config.num_attention_heads)
        elif source.endswith("k_proj.weight"):
            values = _rope_order(values, config.num_key_value_heads)
        stored = STORED[type][0] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(values, stored), raw_dtype=stored)


def _rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head: first halves and second halves (transformers) → pairs (llama.cpp)."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    typer.run(main)
