"""The name of an engine, looked up without importing what it names."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from batchrun.errors import JobError, nearest

METHODS = ("load", "generate")


def refuse_wrong_name(kind: str) -> None:
    """Looks for the class of "module:Class" in its module's source; a name without a colon is an engine of ours.

    Raises:
        JobError: there is no such module or class, or the class has no `load` or no `generate`.
    """
    module, colon, name = kind.partition(":")
    if not colon:
        return
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        fix = "check the name, and that its folder is on PYTHONPATH"
        raise JobError(f"no module {module!r} for engine {kind!r}", "engine.kind", fix)
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    body = ast.parse(Path(spec.origin).read_bytes()).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        # Whatever else binds names may bind this one: an import, an assignment, a condition.
        if all(
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Expr) or _other(node, name) for node in body
        ):
            raise JobError(f"no class {name!r} in {spec.origin}{nearest(name, [*classes])}", "engine.kind")
        return
    own = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
    missing = [method for method in METHODS if method not in own]
    if missing and not classes[name].bases:
        raise JobError(
            f"engine {kind!r} has no {' and no '.join(missing)}",
            "engine.kind",
            "see batchrun/engine/protocol.py",
        )


def _other(node: ast.stmt, name: str) -> bool:
    """Whether a statement of a module binds names, and surely others than this one."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        bound = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        return name not in bound and "*" not in bound
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Name) and target.id != name for target in node.targets)
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != name
