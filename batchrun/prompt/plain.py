"""Templates that put columns between texts and do nothing else: no row can make one of them endless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from jinja2 import nodes

from batchrun.prompt.sandbox import ENVIRONMENT

# Names that mean something else than a column in Jinja.
_TAKEN = {"self", *ENVIRONMENT.globals}


@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """Texts and names of columns in turn: (text, is a column's name) each."""

    pieces: tuple[tuple[str, bool], ...]

    @classmethod
    def of(cls, tree: nodes.Template) -> PlainTemplate | None:
        """The template of a syntax tree; None where that has an expression or a statement."""
        pieces: list[tuple[str, bool]] = []
        for statement in tree.body:
            if not isinstance(statement, nodes.Output):
                return None
            for node in statement.nodes:
                if isinstance(node, nodes.TemplateData):
                    pieces.append((node.data, False))
                elif isinstance(node, nodes.Name) and node.name not in _TAKEN:
                    pieces.append((node.name, True))
                else:
                    return None
        return cls(tuple(pieces))

    def join(self, columns: Mapping[str, Sequence[str]], rows: int) -> list[str]:
        """(rows,) texts, of columns of texts."""
        parts = [columns[piece] if is_column else repeat(piece, rows) for piece, is_column in self.pieces]
        return [*map("".join, zip(*parts, strict=True))] if parts else [""] * rows
