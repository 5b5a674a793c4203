"""A rank other than the first: loads its share, then runs what rank 0 does."""

from __future__ import annotations

import pickle
import threading
import traceback
from dataclasses import replace

import torch

from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.paged.device.device_side import allocate_pages, budget_of, make_runner
from batchrun.engine.paged.device.group import Group, device_of
from batchrun.engine.paged.device.runner import Runner
from batchrun.engine.paged.parallel.divided_sampler import sampler_of
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.processes.rank_link import Link
from batchrun.engine.processes.rank_messages import Done, Failure, Member
from batchrun.errors import one_line


def serve(link: Link) -> None:
    """Runs until rank 0 is gone."""
    member: Member = link.inbox.get()
    group = Group(member.rank, member.spec.gpus, member.store, device_of(member.spec, member.rank))
    link.progress = group.progress.look
    try:
        runner = _load(member, group)
        while True:
            runner.run(link.inbox.get())
            link.send(Done())
    except BaseException as error:
        traceback.print_exc()
        link.send(Failure(one_line(error), is_out_of_memory(error)))
        # Rank 0 may be about to fail of the same, in its own words, and ends this process when it does.
        threading.Event().wait()


def _load(member: Member, group: Group) -> Runner:
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    spec = replace(member.spec, device=str(group.device))
    model = load_share(spec, group, pickle.loads(member.config) if member.config else None)
    budget = budget_of(spec, model, group)
    runner = make_runner(spec, model, sampler_of(spec, model), budget, member.page_size, group)
    allocate_pages(spec, runner, budget, group)
    return runner
