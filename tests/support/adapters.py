"""Random LoRA adapters, in the files that peft's save_pretrained writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.loading import load_model

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def make_adapter(
    folder: Path,
    model: Path,
    targets: Iterable[str] = TARGETS,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """Writes an adapter of random matrices for the model's layers of these names; gives its folder back.

    Args:
        size: standard deviation of the numbers of both matrices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in load_model(EngineSpec("", str(model), str(model))).named_modules():
        if name.rpartition(".")[2] in targets:
            rows, columns = module.weight.shape
            if type(module).__name__ == "Conv1D":
                rows, columns = columns, rows
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                numbers = size * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = numbers
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": rank,
        "lora_alpha": 2 * rank, "target_modules": list(targets), **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
