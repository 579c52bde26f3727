"""Make a LoRA adapter for the bundled model: `python -m models.lora OUT [--seed 1] [--rank 8]`.

It has learnt nothing: its weights are random, the same for a seed on every machine, and large
enough to change what the model says.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.numpy import save_file

BASE = Path(__file__).parent / "tiny"
MODULES = ("q_proj", "v_proj", "down_proj")


def make(out: Path, seed: int = 1, rank: int = 8, base: Path = BASE, named: str = "") -> Path:
    """Write the adapter as PEFT does, and return its folder.

    Args:
        base: a Llama's folder, of which only config.json is read.
        named: what adapter_config.json calls the base model; its folder unless given.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    sizes = {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.v_proj": (hidden, kv_heads * head),
        "mlp.down_proj": (inner, hidden),
    }
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (takes, gives) in sizes.items():
            place = f"base_model.model.model.layers.{layer}.{module}"
            for matrix, shape in (("lora_A", (rank, takes)), ("lora_B", (gives, rank))):
                values = random.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
                tensors[f"{place}.{matrix}.weight"] = values
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": named or str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": MODULES,
        "bias": "none",
    }
    text = json.dumps(adapter, indent=2) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    return out


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the adapter.")],
    seed: Annotated[int, typer.Option(help="Of its weights.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of each pair of matrices.")] = 8,
) -> None:
    """Make a LoRA adapter for the bundled model."""
    print(make(out, seed, rank))


if __name__ == "__main__":
    typer.run(main)
