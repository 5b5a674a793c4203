"""Tokens generated twice because of preemptions, with what rows were so far kept and without.

    python -m tests.measure.preemption JOB.yaml --rows 200 --preemptions 3 --steps 20

The job's own model, prompts and rows; a preemption comes so many decode steps after the engine is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchrun.dataset.rows import read_rows
from batchrun.driver.prepare import Prepared, prepare
from batchrun.engine.processes.process import EngineProcess
from batchrun.job.job import Job
from batchrun.output.attempt import Attempt
from batchrun.storage import Folder
from batchrun.worker.generation import AttemptCounters, Generation


def run(prepared: Prepared, rows: int, preemptions: int, steps: int, keep: bool) -> tuple[int, int]:
    """Tokens generated, and tokens in the answers, of the first partition's first rows."""
    job, plan = prepared.job, prepared.plan
    partition = plan.partitions[0]
    files = plan.files_of(partition)
    generated = preempted = 0
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            attempt = Attempt(
                Folder(scratch), prepared.layout, "job", 0, rows, uuid.uuid4().hex[:12], job.output
            )
            attempt.open()
            if attempt.covered:
                break
            engine = EngineProcess(prepared.codec.engine)

            def wanted(engine: EngineProcess = engine, last: bool = preempted >= preemptions) -> bool:
                return last or engine.stats().steps < steps

            missing = np.zeros(partition.rows, bool)
            missing[attempt.missing] = True
            generation = Generation(
                lambda columns: read_rows(job, plan.schema, partition, files, columns),
                attempt, prepared.codec, job.generation.max_new_tokens, AttemptCounters(run="", partition=0), missing,
            )  # fmt: skip
            generation.run(engine, wanted)
            attempt.flush()
            if keep:
                attempt.keep(generation.begun)
            generated += engine.stats().output_tokens
            engine.stop()
            preempted += 1
        answers = pa.concat_tables(attempt._answers)
    return generated, int(np.sum(answers["output_tokens"].to_numpy()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    words = parser.parse_args()
    prepared = prepare(Job.load(words.job, [f"input.limit={words.rows}"]))
    for keep in (False, True):
        generated, needed = run(prepared, words.rows, words.preemptions, words.steps, keep)
        twice = (generated - needed) / words.preemptions
        print(
            f"{'begun rows kept' if keep else 'finished rows only'}: {generated:,} tokens generated for {needed:,}, "
            f"{twice:,.0f} twice per preemption"
        )


if __name__ == "__main__":
    main()
