"""The README's picture of the live view, taken of the quickstart job half-way through.

    python -m tests.measure.live_picture jobs/images/live.svg [--rows 2000]

On a quiet machine, whose speeds the picture shows.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
import threading
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

import batchrun
from batchrun.errors import Interrupted
from batchrun.job.job import Job
from batchrun.report.live import View
from batchrun.telemetry.progress import Progress

JOB = "jobs/quickstart/job.yaml"
COLUMNS, HALF, PRICE = 84, 0.48, 0.5
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    half = threading.Event()
    with tempfile.TemporaryDirectory() as scratch:
        changes = [
            f"output.path={scratch}/out",
            f"input.limit={args.rows}",
            f"cluster.price_per_gpu_hour={PRICE}",
        ]
        job = Job.load(JOB, changes)
        view = View(job)

        def see(now: Progress) -> None:
            shown = view.render(now)
            if now.rows_done >= HALF * now.rows and not half.is_set():
                console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
                console.print(shown)
                title = f"batchrun run {JOB}"
                args.picture.write_text(with_own_fonts(console.export_svg(title=title, theme=MONOKAI)))
                half.set()

        try:
            batchrun.run(job, on_progress=see, stop=half)
        except Interrupted as stopped:
            print(stopped)


def with_own_fonts(svg: str) -> str:
    """The picture in the reader's own fonts: a README loads none from elsewhere."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code, monospace", FONTS)


if __name__ == "__main__":
    main()
