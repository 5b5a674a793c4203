"""A job as its author wrote it, with `${NAME}` where a value came from the environment, and the secrets in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Values of storage options that may be shown: everything else there is taken for a secret.
HARMLESS_OPTIONS = {"anon", "endpoint_url", "region", "region_name", "use_ssl", "account_name", "project"}

# Keys whose values go to other programs, which hand them on: credentials are expected there.
_HANDED_ON = re.compile(r"(^|\.)storage_options\.|^cluster\.(kubernetes|slurm)\.")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)[^}]*\}")
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth|signature|^sig$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(\w+)=[\"']?([^\s\"']+)")

# A shorter text is no secret worth hiding, and hiding it would take other words apart.
_SHORTEST = 4
_SHORTEST_UNNAMED = 8


def has_variable(value: Any) -> bool:
    """Whether `${NAME}` is anywhere in a value of the job file."""
    return any(_VARIABLE.search(text) for _, text in _texts(value))


def as_written(values: Any, tree: Any) -> Any:
    """`values` (of a job, plain) with those of the job file's `tree` in their place where they hold `${NAME}`."""
    if isinstance(values, Mapping) and isinstance(tree, Mapping):
        return {key: as_written(inner, tree.get(key)) for key, inner in values.items()}
    if isinstance(values, list) and isinstance(tree, list) and len(values) == len(tree):
        return [as_written(inner, written) for inner, written in zip(values, tree, strict=True)]
    return tree if has_variable(tree) else values


def environment(tree: Any) -> dict[str, str]:
    """The variables that the job file names, with their values now; those that are not set have a default there."""
    names = {match[1] for _, text in _texts(tree) for match in _VARIABLE.finditer(text)}
    return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}


def unexpanded(message: str, tree: Any, location: Sequence[Any]) -> str:
    """An error's message about the key at `location` with `${NAME}` in place of what the environment gave."""
    for key in location:
        inside = key in tree if isinstance(tree, Mapping) else isinstance(tree, list) and isinstance(key, int)
        tree = tree[key] if inside else None
    for _, text in _texts(tree):
        for name, value in environment(text).items():
            if len(value) >= _SHORTEST:
                message = message.replace(value, f"${{{name}}}")
    return message


def secrets(values: Mapping[str, Any], tree: Any, known: Mapping[str, str]) -> list[str]:
    """Every text in a job (`values`, plain) that must not be shown anywhere.

    `tree` is the job file's, if any, and `known` the `environment` that it was filled in from.

    Storage options, but harmless ones; what the environment gave to them, to `cluster.kubernetes`, `cluster.slurm` or
    under a name such as API_TOKEN; what stands there in clear text under such a name.
    """
    found = []
    for key, text in _texts(values):
        option = key.rpartition(".")[2]
        if ".storage_options." in key and option not in HARMLESS_OPTIONS:
            found.append(text)
        elif _HANDED_ON.search(key) and option not in HARMLESS_OPTIONS:
            found += [text] if _SECRET_NAME.search(option) else []
            found += [value for name, value in _ASSIGNMENT.findall(text) if _SECRET_NAME.search(name)]
    for key, text in _texts(tree):
        for name in {match[1] for match in _VARIABLE.finditer(text)} & known.keys():
            value = known[name]
            harmless = key.rpartition(".")[2] in HARMLESS_OPTIONS
            handed_on = _HANDED_ON.search(key) and not harmless and len(value) >= _SHORTEST_UNNAMED
            if handed_on or _SECRET_NAME.search(name):
                found.append(value)
    return [text for text in dict.fromkeys(found) if len(text) >= _SHORTEST]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree with its key, dotted; the elements of a list have the list's key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
