"""A rank's share of a model, loaded and joined to the others'."""

from __future__ import annotations

from typing import Any

import torch

from batchrun.engine.paged.device.group import Group
from batchrun.engine.paged.parallel import sums
from batchrun.engine.paged.parallel.loading import read_shares
from batchrun.engine.paged.parallel.sharding import Sharding
from batchrun.engine.processes.launch import available_cores
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.loading import load_config, load_model, random_model


def load_share(spec: EngineSpec, group: Group, config: Any = None) -> Any:
    """This rank's share of the model in `spec.model_path`, on `spec.device`; returns once all ranks have theirs. With
    the `config` of a whole model it gets random weights, in `spec.dtype`.

    Raises:
        Unsupported: the model cannot be divided. Otherwise as `load_model`.
    """
    if group.device.type == "cpu":
        torch.set_num_threads(max(1, available_cores() // group.size))
    sharding = Sharding(config or load_config(spec), group.rank, group.size)
    if config is None:
        shares = read_shares(spec.model_path, sharding, spec.device)
        model = load_model(spec, source=(sharding.config, shares, sharding))
    else:
        # Alike on all ranks, as embeddings and norms have to be.
        model = random_model(spec, sharding.config)
    group.join()
    group.progress.has_read()
    sums.connect(group)
    sharding.finish(model)
    return model
