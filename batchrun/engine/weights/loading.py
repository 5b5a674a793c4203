"""A model out of a local folder, onto its device."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from batchrun.engine.layers.fp8_weights import NO_LAYERS, ONLY_CAUSAL
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.fp8_blocks import expanding
from batchrun.engine.weights.lora import Merge
from batchrun.engine.weights.packed_format import fp8_blocks
from batchrun.engine.weights.part import Part
from batchrun.engine.weights.row_adapters import attach_adapters
from batchrun.engine.weights.tensor_files import open_tensors
from batchrun.errors import ModelError

# What transformers, safetensors and torch raise for a folder that they cannot make a model of.
LOADING_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, AttributeError, ImportError, RuntimeError),
    *(SafetensorError, UnpicklingError),
)


def load_config(spec: EngineSpec) -> Any:
    """The model's transformers config.

    Raises:
        ModelError: there is no readable config, or it needs remote code that the spec does not allow.
    """
    if not Path(spec.model_path).is_dir():
        raise ModelError("no such folder", spec.model_path, "give a folder in transformers' layout")
    try:
        return transformers.AutoConfig.from_pretrained(
            spec.model_path, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise _model_error(error, spec) from error


def load_model(
    spec: EngineSpec, attention: str | None = None, source: tuple[Any, dict[str, Any], Part] | None = None
) -> Any:
    """The model for text generation in `spec.model_path`, on `spec.device`, with `spec.adapter` in its weights and
    `spec.adapters` beside them, ready for inference.

    Args:
        attention: a name that transformers' attention interface knows; by default the best that torch has.
        source: a rank's config and tensors, or slices of files, in place of those in the folder, and what of others
            is the rank's.

    Raises:
        ModelError: it is no model that generates text, its weights are missing, incomplete or pickled (unless
            the spec allows that), or it needs remote code (unless the spec allows that); an adapter that is none,
            or of another model.
        torch.OutOfMemoryError: it does not fit on the device.
    """
    # The progress bars would be all that is left in the short memory of the process's output.
    transformers_logging.disable_progress_bar()
    if source is None:
        config, part = load_config(spec), None
        tensors = _expanded_tensors(spec, config)
    else:
        config, tensors, part = source
    merge = Merge.of(spec.adapter, part)
    fp8 = _fp8_config(spec, config, merge, part)
    auto: Any = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    # Only with accelerate can transformers read weights straight into the device's memory.
    straight = importlib.util.find_spec("accelerate") is not None
    try:
        model, report = (auto if tensors is None else _model_class(auto, config, spec)).from_pretrained(
            spec.model_path if tensors is None else None,
            config=config,
            dtype=choose_dtype(spec, config),
            attn_implementation=attention,
            use_safetensors=None if spec.allow_pickle else True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({"quantization_config": fp8} if fp8 else {}),
            **({"device_map": {"": spec.device}} if straight else {}),
            **({} if tensors is None else {"state_dict": tensors}),
        )
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the machine's fault, not the model's
    except LOADING_ERRORS as error:
        raise _model_error(error, spec) from error
    # transformers gives these random values, with no more than a warning if they are missing altogether.
    random = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if random:
        raise ModelError(
            f"{len(random)} weights are missing or of another shape, such as {random[0]}",
            spec.model_path,
            "copy the whole model, and check that config.json belongs to it",
        )
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} cannot generate text", spec.model_path, "use another model")
    model = model.to(spec.device).eval()
    if merge is not None:
        merge.into(model)
    if spec.adapters:
        attach_adapters(model, spec.adapters, part)
    return model


def random_model(spec: EngineSpec, config: Any) -> Any:
    """A model of the `config` on `spec.device`, ready for inference, with weights that are the same each time. Raises
    ModelError where they are to be in fp8, and it has none that can be."""
    from batchrun.engine.weights.fp8_model import quantize

    torch.manual_seed(0)
    auto, dtype = transformers.AutoModelForCausalLM, getattr(torch, spec.dtype)
    with torch.device(spec.device):
        model = auto.from_config(copy.deepcopy(config), dtype=dtype).eval()
    if spec.quantization and not quantize(model):
        raise ModelError(NO_LAYERS, spec.model_path, "measure it without fp8")
    return model


def _expanded_tensors(spec: EngineSpec, config: Any) -> dict[str, Any] | None:
    """The checkpoint's tensors, where some of them have to be expanded as they are read."""
    blocks = fp8_blocks(getattr(config, "quantization_config", None))
    return None if blocks is None else expanding(open_tensors(spec.model_path), blocks, spec.device)


def _model_class(auto: Any, config: Any, spec: EngineSpec) -> Any:
    """What `auto` would make of a folder with this config."""
    if type(config) in auto._model_mapping:
        return auto._model_mapping[type(config)]
    return get_class_from_dynamic_module(config.auto_map[auto.__name__], spec.model_path)


def _fp8_config(spec: EngineSpec, config: Any, merge: Merge | None, part: Part | None) -> Any:
    """Makes transformers convert the weights to fp8 while it reads them, or read those of a quantized checkpoint.

    None where nothing is quantized. Raises ModelError where that cannot be.
    """
    if spec.quantization is None and getattr(config, "quantization_config", None) is None:
        return None
    from batchrun.engine.layers.fp8 import unsupported_device
    from batchrun.engine.weights.fp8_checkpoint import fp8_checkpoint
    from batchrun.engine.weights.fp8_loading import Fp8Config
    from batchrun.engine.weights.packed_checkpoint import PackedCheckpoint, packed_checkpoint

    checkpoint = fp8_checkpoint(spec.model_path, config) or packed_checkpoint(spec.model_path, config)
    if checkpoint is not None or fp8_blocks(getattr(config, "quantization_config", None)) is not None:
        # From here on it is ours to read, and not the packages' that transformers would ask for.
        del config.quantization_config
    if checkpoint is None and spec.quantization is None:
        return None
    where, fix = "model.quantization", "leave the key out"
    if spec.quantization is None:
        where, fix = spec.model_path, "use the checkpoint in bfloat16"
    expands = isinstance(checkpoint, PackedCheckpoint) and checkpoint.format.expands
    stays_fp8 = spec.quantization is not None or not expands
    if stays_fp8 and (reason := unsupported_device(torch.device(spec.device))):
        raise ModelError(f"fp8 cannot run here, since {reason}", where, fix)
    if config.is_encoder_decoder:
        raise ModelError(ONLY_CAUSAL, where, fix)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the checkpoint is quantized already, in another way", where, fix)
    return Fp8Config(checkpoint, spec.quantization is not None, merge, part)


def choose_dtype(spec: EngineSpec, config: Any) -> torch.dtype:
    """The spec's own; for "auto" float32 on a CPU, on a GPU the checkpoint's half precision, or bfloat16."""
    if spec.dtype != "auto":
        return cast(torch.dtype, getattr(torch, spec.dtype))
    if spec.device == "cpu":
        return torch.float32
    half = getattr(config.get_text_config(), "dtype", None)
    return half if half in (torch.float16, torch.bfloat16) else torch.bfloat16


def _model_error(error: Exception, spec: EngineSpec) -> ModelError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            "the model needs Python code that comes with it",
            spec.model_path,
            "set model.trust_remote_code: true",
        )
    folder = Path(spec.model_path)
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) and not spec.allow_pickle:
            fix = "convert them to safetensors, or accept the risk with model.allow_pickle: true"
            return ModelError("weights are pickled, which can run code", spec.model_path, fix)
        if (folder / "config.json").exists() and "config" not in what.lower():
            return ModelError("no weights (*.safetensors)", spec.model_path, "copy the whole model")
    return ModelError(f"cannot be loaded ({what})", spec.model_path, "check the folder and the model's type")
