"""Writes a LoRA adapter with random weights for the tiny dense model: `python tests/vllm/make_adapter.py FOLDER`.

Runs in vLLM's environment (torch, safetensors).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, LAYERS, HIDDEN = 8, 2, 64
OUT = {"q_proj": 64, "v_proj": 32}


def make(folder: Path) -> None:
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for layer in range(LAYERS):
        for name, size in OUT.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(RANK, HIDDEN, dtype=torch.bfloat16)
            weights[f"{place}.lora_B.weight"] = torch.randn(size, RANK, dtype=torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(OUT), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
