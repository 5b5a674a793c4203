"""What the files of a LoRA adapter say, as PEFT saves them, without torch: scales, names, and what is supported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from batchrun.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MERGE_FIX = "merge it into its model with peft (merge_and_unload) and name the saved model in model.name"

# Keys under which an adapter has more than two matrices for a layer, or needs the base model changed as it was trained.
_MORE = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    "monteclora_config",
)
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """An adapter's adapter_config.json: `scale` is what PEFT multiplies a layer's product with.

    Low-rank adaptation: Hu et al., LoRA, 2021; with `rank_stabilized`: Kalajdzievski, rsLoRA, 2023.
    """

    alpha: float
    alpha_pattern: dict[str, float]
    rank_stabilized: bool
    base: str | None

    @classmethod
    def read(cls, folder: str) -> Self:
        """Raises ModelError: there is none, or it is of an adapter that is more than a product for some layers."""
        path = Path(folder) / CONFIG
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            fix = "give the folder that peft's save_pretrained wrote"
            raise ModelError(f"no {CONFIG} in the adapter's folder", folder, fix) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"not readable as JSON ({error})", str(path), "restore the file") from None
        if not isinstance(values, dict) or "peft_type" not in values:
            raise ModelError("no configuration of a PEFT adapter", str(path), "restore the file")
        if values["peft_type"] != "LORA":
            what = f"an adapter of type {values['peft_type']}, and only LORA is supported"
            raise ModelError(what, str(path), MERGE_FIX)
        if more := _more(values):
            raise ModelError(f"a LoRA adapter with {more}, which is not supported", str(path), MERGE_FIX)
        return cls(
            float(values.get("lora_alpha", 8)),
            {str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            bool(values.get("use_rslora")),
            values.get("base_model_name_or_path"),
        )

    def scale(self, layer: str, rank: int) -> float:
        """Of a layer's product, by the layer's name in the model."""
        own = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
        return next(own, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def matrices_by_layer(names: Iterable[str], where: str) -> dict[str, tuple[str, str]]:
    """The layers that an adapter's tensors are for, each with the names of its A and its B.

    Raises:
        ModelError: a tensor is neither, or a layer lacks one of them; no layer at all.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            what = f"holds {name}, which is not a low-rank matrix of a linear layer"
            raise ModelError(what, where, MERGE_FIX)
        found.setdefault(match["layer"], {})[match["side"]] = name
    if not found:
        raise ModelError("holds no weights", where, "copy the whole adapter")
    for layer, sides in found.items():
        if len(sides) < 2:
            raise ModelError(f"has one matrix of {layer} only", where, "copy the whole adapter")
    return {layer: (sides["A"], sides["B"]) for layer, sides in sorted(found.items())}


def _more(values: dict[str, Any]) -> str | None:
    """What an adapter has beyond a product for each layer."""
    if values.get("bias", "none") != "none":
        return f"bias: {values['bias']}"
    init = str(values.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING):
        return f"init_lora_weights: {init}"
    return next((key for key in _MORE if values.get(key)), None)
