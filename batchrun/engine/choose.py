"""From the word in the job file to a loaded engine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from batchrun.engine.protocol import Engine, EngineSpec
from batchrun.engine.weights.packed_format import expanded_bytes, fp8_blocks, packed_format
from batchrun.errors import JobError, ModelError
from batchrun.imports import distributions_on_demand, hidden
from batchrun.units import size

# transformers imports them wherever they are installed, for training losses, images and assisted decoding: 1.5 of the
# 10 s that importing took on a machine that has them.
UNUSED = ("sklearn", "scipy", "pandas", "torchvision")

# When the modules of engines were imported.
_imported: dict[str, float] = {}

BUILT_IN = {
    "padded": "batchrun.engine.padded.engine:PaddedEngine",
    "paged": "batchrun.engine.paged:PagedEngine",
}


def preload(kind: str) -> None:
    """Imports what the engine "padded", "paged" or "auto" needs. What cannot be imported is told by `load_engine`."""
    if kind == "auto":
        import torch

        kind = "paged" if torch.cuda.is_available() else "padded"
    with suppress(JobError):
        _find(kind)


def load_engine(spec: EngineSpec) -> Engine:
    """Loads the engine that `spec.kind` names: "padded", "paged", "auto" or "module:Class".

    "auto" is the paged engine where it supports the model, the padded one otherwise; `stats.notes` says why. With
    several `gpus` it is the paged one.

    Raises:
        JobError: there is no such class, or it is no engine.
        ModelError: the model cannot be loaded, or not as the job asks: onto several GPUs, with keys and values in fp8.
    """
    if spec.kind not in ("auto", *BUILT_IN):
        return _load(spec.kind, spec)
    spec = _placed(spec)
    kind, reason = spec.kind, None
    if kind == "auto":
        reason = why_not_paged(spec)
        if reason and spec.gpus > 1:
            raise ModelError(
                f"{spec.gpus} GPUs for one engine need the paged engine, which cannot run it: {reason}",
                spec.model_path,
                "set engine.gpus: 1",
            )
        kind = "padded" if reason else "paged"
    if kind == "padded" and spec.cache_dtype != "auto":
        because = f", which cannot run this model, since {reason}" if reason else ""
        raise ModelError(
            f"only the paged engine keeps keys and values in {spec.cache_dtype}{because}",
            "engine.cache_dtype",
            "leave the key out" if reason else "leave the key out, or set engine.kind: paged",
        )
    engine = _load(kind, spec)
    if reason:
        engine.stats.notes.append(f"padded engine, since {reason}")
    if spec.adapter is not None:
        engine.stats.notes.append(f"the adapter {Path(spec.adapter).name} is merged into the weights")
    if spec.adapters:
        engine.stats.notes.append(f"{len(spec.adapters)} adapters, of which each row has its own or none")
    engine.stats.notes += _cpu_notes(spec)
    engine.stats.notes += _checkpoint_notes(spec)
    if compiles_at_every_start():
        engine.stats.notes.append(
            "torch came without bytecode and PYTHONDONTWRITEBYTECODE keeps Python from writing it, so that every start "
            "compiles it anew (10 s on an H200 machine): unset it, or run python -m compileall once"
        )
    return engine


def _cpu_notes(spec: EngineSpec) -> list[str]:
    """What a CPU only does in the place of GPUs, for trying it out."""
    if spec.device != "cpu":
        return []
    notes = []
    if spec.quantization:
        notes.append(
            "a CPU has no fp8 products: it multiplies the same numbers in float32, slower than without quantization"
        )
    if spec.cache_dtype == "fp8":
        notes.append(
            "a CPU has no use for keys and values in fp8: it widens the same numbers to float32, slower than without "
            "engine.cache_dtype"
        )
    if spec.gpus > 1:
        notes.append(f"engine.gpus: {spec.gpus} are {spec.gpus} processes on the CPU here, slower than one")
    return notes


def _checkpoint_notes(spec: EngineSpec) -> list[str]:
    """What became of the numbers that a quantized checkpoint is published in."""
    from batchrun.engine.weights.loading import choose_dtype, load_config
    from batchrun.engine.weights.tensor_files import open_tensors

    config = load_config(spec)
    settings = getattr(config, "quantization_config", None) or {}
    form, blocks = packed_format(settings), fp8_blocks(settings)
    if form is not None and not form.expands:
        return ["the checkpoint's fixed scales of activations are not used: each token gets its own scale"]
    if form is None and blocks is None:
        return []
    name = form.name if form is not None else "block-scaled fp8"
    what = "the model's dtype" + (", then converted to fp8," if spec.quantization else "")
    shapes = {name: tensor.get_shape() for name, tensor in open_tensors(spec.model_path).items()}
    memory = expanded_bytes(settings, shapes, choose_dtype(spec, config).itemsize, bool(spec.quantization))
    files = sum(file.stat().st_size for file in Path(spec.model_path).glob("*.safetensors"))
    return [
        f"the checkpoint's {name} weights are expanded to {what} while loading: {size(memory)} in memory, "
        f"{size(files)} in its files"
    ]


def _load(kind: str, spec: EngineSpec) -> Engine:
    engine = _find(kind).load(spec)
    engine.stats.times["engine imported"] = _imported[kind]
    return engine


def compiles_at_every_start() -> bool:
    """Whether Python has no bytecode of torch and may not write any, as in many images."""
    import torch  # the built-in engines have imported it

    return sys.dont_write_bytecode and not Path(importlib.util.cache_from_source(torch.__file__)).exists()


def why_not_paged(spec: EngineSpec) -> str | None:
    """Why "auto" chooses the padded engine for this model and device; None when it chooses the paged one."""
    if spec.device == "cpu" and spec.gpus == 1 and spec.cache_dtype == "auto":
        # Gathering pages costs more than padding there: 2,000 short rows through a model of 2.5 million
        # parameters took 242 s paged and 38 s padded on the same two cores.
        return "it is the faster one on a CPU"
    try:
        paged: Any = _find("paged")
    except JobError as error:
        return error.what
    return cast(str | None, paged.unsupported(spec))


def _placed(spec: EngineSpec) -> EngineSpec:
    """`device` "auto" is the one GPU that this process was given, or the CPU."""
    if spec.device != "auto":
        return spec
    import torch  # only here: an engine of the user's own need not use it

    return replace(spec, device="cuda" if torch.cuda.is_available() else "cpu")


def _find(kind: str) -> type[Engine]:
    path = BUILT_IN.get(kind, kind)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise JobError(f"no engine {kind!r}", "engine.kind", "use auto, padded, paged, or module:Class")
    try:
        with hidden(UNUSED if kind in BUILT_IN else ()), distributions_on_demand():
            module = importlib.import_module(module_name)
        _imported.setdefault(kind, time.time())
        found = getattr(module, class_name)
    except (ImportError, AttributeError) as error:
        fix = "check the name, and that its module is installed on every worker"
        raise JobError(f"engine {path!r} cannot be imported ({error})", "engine.kind", fix) from error
    missing = [name for name in ("load", "generate") if not callable(getattr(found, name, None))]
    if missing:
        raise JobError(
            f"engine {path!r} has no {' and no '.join(missing)}", "engine.kind", "see engine/protocol.py"
        )
    return cast(type[Engine], found)
