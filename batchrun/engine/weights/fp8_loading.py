"""Weights become fp8 one by one while transformers loads them: no second copy of a model is ever in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from batchrun.engine.layers.fp8 import FP8, Fp8Linear, quantize_rows
from batchrun.engine.layers.fp8_experts import PARAMETERS, Fp8Experts
from batchrun.engine.layers.fp8_weights import NO_LAYERS
from batchrun.engine.weights.fp8_checkpoint import Fp8Checkpoint, prepare
from batchrun.engine.weights.fp8_model import quantize, with_fp8_layers
from batchrun.engine.weights.lora import Merge
from batchrun.engine.weights.packed_checkpoint import PackedCheckpoint
from batchrun.engine.weights.part import Part
from batchrun.errors import ModelError

METHOD = "batchrun-fp8"
"""The name under which transformers finds the quantizer; no checkpoint has it."""


@register_quantization_config(METHOD)
class Fp8Config(QuantizationConfigMixin):
    """Asks `from_pretrained` for the quantizer below: to read a quantized checkpoint, to convert weights, or both. What
    is converted gets an adapter's product before, since it loses most of one afterwards."""

    def __init__(
        self,
        checkpoint: Fp8Checkpoint | PackedCheckpoint | None,
        convert: bool,
        merge: Merge | None = None,
        part: Part | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.checkpoint, self.convert, self.merge, self.part = checkpoint, convert, merge, part


@register_quantizer(METHOD)
class Fp8Quantizer(HfQuantizer):
    """Prepares the model without data, names the weights to convert, and converts each as it is read."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        checkpoint = self.quantization_config.checkpoint
        if isinstance(checkpoint, PackedCheckpoint):
            checkpoint.prepare(model)
        elif checkpoint is not None:
            prepare(model, checkpoint)
        elif not with_fp8_layers(model):
            raise ModelError(NO_LAYERS, "model.quantization", "leave the key out")
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether the parameter is a weight of an Fp8Linear or of Fp8Experts, and not in fp8 already."""
        owner, _dot, name = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, Fp8Experts):
            return name in PARAMETERS and getattr(layer, name).dtype != FP8
        return name == "weight" and isinstance(layer, Fp8Linear) and layer.weight.dtype != FP8

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a number once it is loaded: so much memory transformers asks for in advance."""
        return 1.0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """What converts one weight."""
        return _Quantize(self.quantization_config.merge)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # Some releases of transformers compare no shapes where there is a quantizer.
        for name, parameter in model.named_parameters():
            if parameter.shape != self._shapes[name]:
                want, have = tuple(self._shapes[name]), tuple(parameter.shape)
                raise ValueError(f"{name} has the shape {have}, where its config wants {want}")
        # Its layers are as good as any others: nothing else needs to know.
        self.remove_quantization_config(model)
        dtype = model.get_input_embeddings().weight.dtype
        checkpoint = self.quantization_config.checkpoint
        if isinstance(checkpoint, PackedCheckpoint):
            how = self.quantization_config
            checkpoint.expand(model, dtype, how.convert, how.merge, how.part)
            if how.convert and checkpoint.format.expands:
                if how.merge is not None:
                    how.merge.into(model)
                # Those that the checkpoint has in the model's own format.
                quantize(model)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Nobody saves it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Nobody trains it."""
        return False


class _Quantize(ConversionOps):
    def __init__(self, merge: Merge | None) -> None:
        self._merge = merge

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        converted = {}
        for name, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            with torch.no_grad():
                if self._merge is not None:
                    weight = self._merge.merged(name.removesuffix(".weight"), weight)
                converted[name], converted[f"{name}_scale"] = quantize_rows(weight)
        return converted
