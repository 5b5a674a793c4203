"""A small model through the paged engine, for compute-sanitizer to watch: long rows, a tight pool, sampling."""

from __future__ import annotations

import numpy as np
import real_rows

from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec, Request, Sampling

prompts = [prompt[:1500] for prompt in real_rows.prompts(200)]
for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1)):
    spec = EngineSpec(
        "paged", "", "", dtype="bfloat16", device="cuda", max_context=2048, sampling=sampling, stop_token_ids=(3,),
        options={"cache_tokens": 20_000, "max_rows": 64, "prefill_tokens": 4096},
    )  # fmt: skip
    engine = PagedEngine(spec, real_rows.model(real_rows.SMALL))
    got = list(engine.generate(Request(i, p, 16, i) for i, p in enumerate(prompts)))
    engine._scheduler.check()
    assert sorted(one.id for one in got) == list(range(200))
    assert all(one.fault is None for one in got)
    print(len(got), engine.stats.gauges, np.mean([len(one.token_ids) for one in got]), flush=True)
