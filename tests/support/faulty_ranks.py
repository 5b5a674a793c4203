"""The paged engine over ranks of which those beyond the first are faulty: `engine.kind: faulty_ranks:Engine`."""

from __future__ import annotations

import os
from typing import Self

from faulty_rank import SILENT_SECONDS

from batchrun.engine.choose import _placed
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.parallel import ranks
from batchrun.engine.protocol import EngineSpec

STUCK_SECONDS = "BATCHRUN_TEST_STUCK_SECONDS"


class Engine(PagedEngine):
    """Ranks that do not get on are given up after `STUCK_SECONDS`, silent ones after `SILENT_SECONDS`, if those are
    set."""

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        ranks.PROGRAM = "faulty_rank"
        ranks.PULSE_SECONDS = 0.2  # type: ignore[assignment]
        ranks.STUCK_SECONDS = float(os.environ.get(STUCK_SECONDS, ranks.STUCK_SECONDS))  # type: ignore[assignment]
        ranks.SILENT_SECONDS = float(os.environ.get(SILENT_SECONDS, ranks.SILENT_SECONDS))  # type: ignore[assignment]
        return super().load(_placed(spec))
