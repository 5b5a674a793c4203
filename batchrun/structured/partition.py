"""The coarsest partition of an automaton's states that tells none apart which accept the same texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Partition:
    """A refinable partition of the numbers below `size`."""

    def __init__(self, size: int) -> None:
        self.elements = list(range(size))
        self.places = list(range(size))
        self.set_of = [0] * size
        self.first, self.past, self.marked = [0], [size], [0]
        self.touched: list[int] = []

    def mark(self, element: int) -> None:
        """The next `split` parts the element from those of its set that are not marked."""
        of = self.set_of[element]
        place, target = self.places[element], self.first[of] + self.marked[of]
        other = self.elements[target]
        self.elements[place], self.places[other] = other, place
        self.elements[target], self.places[element] = element, target
        if not self.marked[of]:
            self.touched.append(of)
        self.marked[of] += 1

    def split(self) -> None:
        """Marked elements of a set become a set of their own, or the others where these are fewer."""
        for of in self.touched:
            middle = self.first[of] + self.marked[of]
            if middle < self.past[of]:
                if self.marked[of] <= self.past[of] - middle:
                    self._add(self.first[of], middle)
                    self.first[of] = middle
                else:
                    self._add(middle, self.past[of])
                    self.past[of] = middle
            self.marked[of] = 0
        self.touched = []

    def _add(self, first: int, past: int) -> None:
        number = len(self.first)
        self.first.append(first)
        self.past.append(past)
        self.marked.append(0)
        for place in range(first, past):
            self.set_of[self.elements[place]] = number


def coarsest(
    accepting: NDArray[np.bool_], sources: list[int], labels: list[int], targets: list[int]
) -> list[int]:
    """The block of each state in the minimal automaton; state 0 is dead, and edges come sorted by label.

    Valmari and Lehtinen, "Efficient Minimization of DFAs with Partial Transition Functions" (2008): Hopcroft's
    algorithm in O(edges log states), where most bytes lead nowhere.
    """
    blocks = Partition(len(accepting))
    for state in np.flatnonzero(accepting).tolist():
        blocks.mark(state)
    blocks.split()
    # The dead state has no edges, so nothing else would tell it from useful states.
    blocks.mark(0)
    blocks.split()
    cords = Partition(len(labels))
    for edge in range(1, len(labels)):
        if labels[edge] != labels[edge - 1]:
            for later in range(edge, len(labels)):
                if labels[later] != labels[edge]:
                    break
                cords.mark(later)
            cords.split()
    incoming: list[list[int]] = [[] for _ in accepting]
    for edge, target in enumerate(targets):
        incoming[target].append(edge)
    block = 1
    for_cord = 0
    while for_cord < len(cords.first):
        for place in range(cords.first[for_cord], cords.past[for_cord]):
            blocks.mark(sources[cords.elements[place]])
        blocks.split()
        for_cord += 1
        while block < len(blocks.first):
            for place in range(blocks.first[block], blocks.past[block]):
                for edge in incoming[blocks.elements[place]]:
                    cords.mark(edge)
            cords.split()
            block += 1
    return blocks.set_of
