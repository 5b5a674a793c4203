"""Plots as SVG text for a page: drawn without a display, coloured by the page so that they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

# Drawn in these colours, which stand for the page's own: an SVG inside the page knows its CSS variables.
THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--first)",
    "#050505": "var(--second)",
}
INK, MUTED, LINE, FIRST, SECOND = THEME
SMOOTHED_SECONDS = 5.0
# Inches of 72 pixels: readable as it is on a telephone, several side by side elsewhere.
SIZE = (4.4, 2.3)
# Left, bottom, right, top, as shares.
MARGINS = (0.11, 0.19, 0.98, 0.88)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}

Values = Sequence[float | None]


def over_time(
    seconds: Values, lines: Mapping[str, Values], share: bool = False, starts: Sequence[float] = ()
) -> str:
    """Up to two lines, by name, over the time of all runs; shares are drawn between 0 and 100%.

    A NaN among the values interrupts its line, None does not. `starts` of further runs are marked, in seconds.
    """

    def draw(axes: Axes) -> None:
        unit, per = _time_unit(seconds)
        at = np.array(seconds, float) / per
        for (name, values), color in zip(lines.items(), (FIRST, SECOND), strict=False):
            known = [i for i, value in enumerate(values) if value is not None]
            axes.plot(at[known], np.array(values, float)[known], color=color, label=name)
        if share:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(_short)
        for start in starts:
            axes.axvline(start / per, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlim(0, max(at[-1], 1e-9))
        axes.set_xlabel(unit)
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0, handlelength=1.2)

    return _svg(draw)


def histogram(values: NDArray[np.int64], unit: str) -> str:
    """How often which length occurs, the far end of a long tail gathered in the last bar."""

    def draw(axes: Axes) -> None:
        low, high = int(values.min()), int(np.percentile(values, 99.5))
        step = max(1, -(-(high - low + 1) // 40))
        edges = np.arange(low, high + step + 1, step) - 0.5
        axes.hist(np.minimum(values, high), bins=edges.tolist(), color=FIRST)
        if values.max() > high:
            axes.annotate(
                f"longest {values.max():,}", (1, 1), xycoords="axes fraction", ha="right", va="bottom"
            )
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        axes.locator_params(integer=True)
        axes.set_xlabel(unit)
        axes.set_ylabel("rows")
        axes.grid(axis="y")

    return _svg(draw)


def rates(seconds: Values, sums: Values, per: Values | None = None) -> list[float | None]:
    """How fast a sum grew at each moment, per second or per unit of another sum, over the time just before it.

    That time is a twentieth of the run, at least five seconds: completions come in batches, and a rate between two
    samples would show the batches alone. None where the other sum stood still.
    """
    at, values = np.array(seconds, float), np.array(sums, float)
    units = at if per is None else np.array(per, float)
    window = max(SMOOTHED_SECONDS, at[-1] / 20)
    before = np.maximum(at - window, 0.0)
    grown = values - np.interp(before, [0.0, *at], [0.0, *values])
    passed = units - np.interp(before, [0.0, *at], [0.0, *units])
    return [max(0.0, g) / p if p > 0 else None for g, p in zip(grown.tolist(), passed.tolist(), strict=True)]


def _short(value: float, _: float = 0) -> str:
    """A tick's label: 0.2, 150, 4k, 1.5M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.3g}"


def _time_unit(seconds: Values) -> tuple[str, float]:
    last = seconds[-1] or 0.0
    return ("hours", 3600.0) if last > 3 * 3600 else ("minutes", 60.0) if last > 180 else ("seconds", 1.0)


def _svg(draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        # A layout that measures its texts takes three times as long.
        figure.subplots_adjust(*MARGINS)
        draw(figure.subplots())
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """The bare element: no prologue, no background, no size, fonts and colours those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for color, variable in THEME.items():
        svg = svg.replace(color, variable)
    return svg
