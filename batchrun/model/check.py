"""What a look at a model's files tells before any of it is loaded: weights cut short, and no model for text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchrun.engine.layers.fp8_weights import why_not_fp8
from batchrun.engine.weights.packed_format import FIX, described, is_read, packed_format, quantized_experts
from batchrun.errors import ModelError
from batchrun.job.settings import ModelSettings

INDEX = "model.safetensors.index.json"
# Bytes; safetensors' own limit.
LARGEST_HEADER = 100 << 20

# What comes after "For" in the class that a checkpoint was saved from.
GENERATING = ("CausalLM", "ConditionalGeneration", "Seq2SeqLM", "ImageTextToText", "PreTraining")
# Types whose bare models ("BertModel") are encoders.
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "modernbert"),
    *("nomic_bert", "roberta", "xlm-roberta", "clip", "dinov2", "vit", "wav2vec2"),
)


def check_model(folder: str, settings: ModelSettings) -> None:
    """Looks at config.json, and at the headers of the weights.

    Raises:
        ModelError: no model that generates text; weights that are missing, cut short, not in the format, or cannot be
            quantized as the job asks.
    """
    path, config = Path(folder), dict[str, Any]()
    # Finding the model tells of these.
    with suppress(OSError, ValueError, AttributeError):
        config |= json.loads((path / "config.json").read_bytes())
        _refuse_other_models(config, folder)
        _refuse_other_formats(config.get("quantization_config"), folder)
    shapes = _sound_weights(path)
    if not settings.trust_remote_code:
        # Models with code of their own may have experts of linear layers, as transformers' have not.
        _refuse_quantized_experts(config, shapes, folder)
    if settings.quantization is not None:
        _refuse_fp8(config, shapes)


def _refuse_other_models(config: Mapping[str, Any], where: str) -> None:
    names = [str(name) for name in config.get("architectures") or []]
    if names and not any(_generates(name, str(config.get("model_type"))) for name in names):
        raise ModelError(
            f"{', '.join(names)} does not generate text", where, "use a model that does (...ForCausalLM)"
        )


def _refuse_other_formats(settings: Mapping[str, Any] | None, where: str) -> None:
    if settings and not is_read(settings):
        raise ModelError(f"quantized weights of this kind are not read ({described(settings)})", where, FIX)


def _refuse_quantized_experts(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str
) -> None:
    if found := quantized_experts(config.get("quantization_config"), shapes):
        fix = (
            "use the model's bfloat16 checkpoint (with model.quantization: fp8, where that is too large), or one in "
            "block-scaled fp8 or MXFP4"
        )
        raise ModelError(f"{found}, are not read", where, fix)


def _refuse_fp8(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    form = packed_format(config.get("quantization_config"))
    expanded = form.expanded(shapes) if form is not None and form.expands else shapes
    if reason := why_not_fp8(config, expanded):
        raise ModelError(reason, "model.quantization", "leave the key out")


def _generates(architecture: str, model_type: str) -> bool:
    task = re.search(r"For([A-Z]\w*)$", architecture)
    if task:
        return task[1].startswith(GENERATING)
    return not (architecture.endswith("Model") and "LMHead" not in architecture and model_type in ENCODERS)


def _sound_weights(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors by name, once the length of every *.safetensors file was held against its header, and
    all of them against the index."""
    held = {file.name: tensor_shapes(file) for file in sorted(path.glob("*.safetensors"))}
    shapes = {name: shape for tensors in held.values() for name, shape in tensors.items()}
    if not (path / INDEX).is_file():
        return shapes
    try:
        index: Mapping[str, str] = json.loads((path / INDEX).read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"not readable as an index ({error})", str(path / INDEX), "restore it") from None
    if missing := sorted(set(index.values()) - held.keys()):
        what = f"{len(missing)} of {len(set(index.values()))} files of weights are missing, the first is {missing[0]}"
        raise ModelError(what, str(path), "copy the whole model")
    if lost := sorted(name for name, file in index.items() if name not in held[file]):
        what = f"lacks {len(lost)} weights that the index names, such as {lost[0]}"
        raise ModelError(what, str(path / index[lost[0]]), "copy the whole model")
    return shapes


def model_shapes(folder: str, files: Sequence[str]) -> dict[str, list[int]]:
    """Names and shapes of the tensors in those of a folder's files that are safetensors: of weights that are expanded
    while loading as they are afterwards.

    Raises:
        ModelError: see `tensor_shapes`.
    """
    weights = [Path(folder) / file for file in files if file.endswith(".safetensors")]
    shapes = {name: shape for file in weights for name, shape in tensor_shapes(file).items()}
    config = Path(folder) / "config.json"
    settings = json.loads(config.read_bytes()).get("quantization_config") if config.is_file() else None
    form = packed_format(settings)
    return form.expanded(shapes) if form is not None and form.expands else shapes


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file, which must be as long as its header says.

    Raises:
        ModelError: it is not.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelError(
                "a Git LFS pointer, not the weights", str(file), "fetch them with `git lfs pull`"
            )
        if length > min(size - 8, LARGEST_HEADER):
            raise _damaged(file, f"{size:,} bytes are too few for its header")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            names = header.keys() - {"__metadata__"}
            end = max((int(header[name]["data_offsets"][1]) for name in names), default=0)
            shapes = {name: [int(length) for length in header[name]["shape"]] for name in names}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _damaged(file, "its header is damaged") from None
    if size != 8 + length + end:
        raise _damaged(file, f"{size:,} of {8 + length + end:,} bytes are there")
    return shapes


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(f"weights are cut short or damaged: {what}", str(file), "copy the file again")
