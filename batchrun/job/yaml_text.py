"""The YAML of a job file: plain values, no key twice, no aliases that blow up, and errors that say how to fix them."""

from __future__ import annotations

from typing import Any

import yaml

from batchrun.errors import JobError, first_line


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a date stays text: `--set input.path=2026-01-31` is a path, and no key may come twice."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} appears twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)

# Values of a job file with every alias written out. Jobs have hundreds; a few nested aliases can make billions.
MOST_VALUES = 100_000


def _refuse_bomb(root: yaml.Node | None) -> None:
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            # Until it is known: an alias of a node inside itself has no end.
            sizes[id(node)] = MOST_VALUES
            inner = (
                [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
            )
            inner += node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if root is not None and size(root) > MOST_VALUES:
        raise yaml.composer.ComposerError(
            None, None, f"its aliases stand for more than {MOST_VALUES:,} values", root.start_mark
        )


def parse_yaml(text: str, where: str) -> Any:
    """The text's plain values: mappings, lists, texts, numbers, booleans and None.

    Raises:
        JobError: names the line, what is wrong with it, and how to fix it.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            _refuse_bomb(root)
            return None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _explained(error, text, where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise JobError(f"not valid YAML ({first_line(error)})", where, "fix the text") from None


def _explained(error: yaml.MarkedYAMLError, text: str, where: str) -> JobError:
    """What PyYAML says of a line, with the fix for what people mostly get wrong."""
    what, mark = error.problem or "it cannot be read", error.problem_mark
    if "end of stream" in what or "<stream end>" in what:
        # It is missed at the end of the file; what is not closed begins where the context does.
        what, mark = "a quote or a bracket is not closed", error.context_mark or mark
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    place = f"{where}:{mark.line + 1}" if mark else where
    return JobError(f"not valid YAML ({what})", place, _advice(what, line))


# What texts begin with that YAML takes for something else: a mapping, a list, an alias, a tag.
_TAKEN_FOR_YAML = ("{{", "{%", "*", "&", "%", "@", "`", "!", "[[")


def _advice(what: str, line: str) -> str:
    if "appears twice" in what:
        return "remove one of the two"
    if "not closed" in what:
        return "close it"
    if "constructor" in what:
        return "write a plain value, without a !tag"
    if "another document" in what:
        return "keep one job in a file"
    if line.lstrip(" ").startswith("\t"):
        return "use spaces for indentation, not tabs"
    value = line.partition(":")[2]
    if "is not text" in what and not value.strip().startswith("{"):
        return "put the key in quotes"
    if "alias" in what or value.strip().startswith(_TAKEN_FOR_YAML) or ": " in value:
        return 'put the text in quotes: key: "..."'
    return "fix the line, or the one above it: indentation, colons, quotes"
