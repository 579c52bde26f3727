"""What transformers says with LoRA adapters merged into the weights: `MODEL ADAPTER…`.

A process of its own, which prints the texts as JSON: the model's own, then one an adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any

PROMPT = "import os\n\ndef "
TOKENS = 24


def merge(model: Any, folder: Path) -> None:
    """W + alpha / r * B A, in place."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                weight = model.get_submodule(module).weight
                weight += config["lora_alpha"] / config["r"] * (up @ down)


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, *adapters = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    texts = []
    for adapter in (None, *adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter:
            merge(model, Path(adapter))
        tokens = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0]
        texts.append(tokenizer.decode(tokens[prompt["input_ids"].shape[1] :]))
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
