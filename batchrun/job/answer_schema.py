"""Where a job's JSON Schema comes from: the job file itself, a file beside it, or a pydantic model."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from batchrun.errors import JobError, first_line

_MODEL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_schema(name: str, base: Path) -> dict[str, Any]:
    """The schema in the file `name` (JSON or YAML), or of the pydantic model "module:Class"; `base` is where relative
    paths start from, and where modules are looked for first.

    Raises:
        JobError: there is no such file or model, or it has no schema.
    """
    schema = _of_model(name, base) if _MODEL.fullmatch(name) else _of_file(base / Path(name).expanduser())
    if not isinstance(schema, dict):
        raise JobError("it holds no JSON Schema", f"answer.schema: {name}", "give a mapping with a type")
    return schema


def _of_file(path: Path) -> Any:
    try:
        # JSON is YAML.
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(
            f"cannot be read ({error.strerror})",
            f"answer.schema: {path}",
            "give a JSON or YAML file, or module:Class",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"is neither JSON nor YAML ({first_line(error)})"
        raise JobError(what, f"answer.schema: {path}", "correct the file") from None


def _of_model(name: str, base: Path) -> Any:
    module, _, attribute = name.partition(":")
    where = f"answer.schema: {name}"
    sys.path.insert(0, str(base))
    try:
        model = getattr(importlib.import_module(module), attribute)
        return model.model_json_schema()
    except (ImportError, AttributeError) as error:
        fix = "give module:Class of a pydantic model, its module beside the job file or installed"
        raise JobError(f"no pydantic model ({first_line(error)})", where, fix) from None
    finally:
        sys.path.remove(str(base))
