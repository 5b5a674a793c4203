"""One of several ranks that sum, in a process of its own: `summing_rank.py <rank> <ranks> <folder> <cpu or cuda>`.

Ends with 0 where every sum was right and the same bits on all ranks. On a CPU their memory is files in the folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from batchrun.engine.layers.fp8 import quantize_rows
from batchrun.engine.paged.device.group import Group
from batchrun.engine.paged.device.sampler import INVALID_TOKEN, Sampler
from batchrun.engine.paged.parallel import peer_sum, sums
from batchrun.engine.paged.parallel.divided_sampler import DividedSampler
from batchrun.engine.paged.parallel.sharding import DividedHead
from batchrun.engine.protocol import Sampling


def run_ranks(ranks: int, folder: Path, kind: str) -> None:
    """Starts them all, and fails with what they said if one does."""
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder), kind], stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)


def check_sums(peers: peer_sum.PeerSum, rank: int, counts: list[int], dtypes: list[torch.dtype]) -> None:
    """One sum after the other, of many sizes in turns, so that both rooms are written again and again."""
    for number, count in enumerate(counts * 2):
        for dtype in dtypes:
            parts = [_numbers(number, other, count).to(dtype) for other in range(dist.get_world_size())]
            x = parts[rank].clone()
            peers.add(x)
            want = torch.zeros_like(x, dtype=torch.float32)
            for part in parts:
                want += part.float()
            assert torch.equal(x, want.to(dtype)), (count, dtype)


def check_linear(rank: int, dtype: torch.dtype) -> None:
    """Few rows, and enough to be summed chunk by chunk, the last one shorter; with and without a bias, and in fp8."""
    everyone = range(dist.get_world_size())
    for rows in (5, sums.CHUNK_ROWS + 72):
        inputs = [_numbers(1, other, rows * 64).view(rows, 64).to(dtype) for other in everyone]
        weights = [_numbers(2, other, 32 * 64).view(32, 64).to(dtype) for other in everyone]
        x, weight = inputs[rank], weights[rank]
        bias = torch.full((32,), 0.0 if rank else 1.0, dtype=dtype, device=_device)
        want = sum(
            functional.linear(*pair) for pair in zip(map(_exact, inputs), map(_exact, weights), strict=True)
        )
        # In turns, and more often than there are places for what is sent.
        for _ in range(3):
            _check(sums.summed_linear(x, weight, None), want)
            _check(sums.summed_linear(x, weight, bias), want + 1)
        fp8 = quantize_rows(x), quantize_rows(weight)
        want = sum(functional.linear(*(_exact(*quantize_rows(one)) for one in pair))
                   for pair in zip(inputs, weights, strict=True))  # fmt: skip
        _check(sums.summed_fp8_linear(*fp8[0], *fp8[1], bias, dtype), want + 1)


def check_likeliest(rank: int, size: int) -> None:
    """The token that whole logits give: the first of equals on different ranks, none where a logit is no number."""
    whole = nn.Linear(16, 11, bias=False).requires_grad_(False).to(_device)
    whole.weight.copy_(_numbers(4, 0, 11 * 16).view(11, 16))
    whole.weight[9] = whole.weight[2]
    x = torch.cat(
        [_numbers(5, 0, 40 * 16).view(40, 16), whole.weight[2:3], torch.full((1, 16), torch.nan).to(_device)]
    )
    head = DividedHead(whole, rank, size, tied=False)
    sampler, nobodys = DividedSampler(Sampling(), head), torch.zeros(len(x), dtype=torch.long)
    want = Sampler(Sampling()).sample(whole(x), nobodys, nobodys)
    assert want[40] == 2
    assert want[41] == INVALID_TOKEN
    assert torch.equal(sampler.sample(head(x), nobodys, nobodys), want)
    with sampler.whole_logits():
        assert torch.allclose(head(x), whole(x), equal_nan=True)


def _exact(numbers: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    return numbers.double() * scale


def _check(made: Tensor, want: Tensor) -> None:
    near = 1e-5 if made.dtype == torch.float32 else 0.01
    assert made.shape == want.shape
    assert torch.allclose(made.double(), want, rtol=near, atol=32 * near)
    _check_the_same(made)


def check_captured(peers: peer_sum.PeerSum, rank: int) -> None:
    """An odd number of sums in a graph, replayed again and again: as NCCL has them, the same bits on all ranks."""
    source = _numbers(3, rank, 310 * 4096).bfloat16()
    x, graph, stream = source.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        x.copy_(source)
        for _ in range(3):
            peers.add(x)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    want = source.clone()
    for _ in range(3):
        dist.all_reduce(want)
    for _ in range(20):
        x.zero_()
        graph.replay()
        assert torch.allclose(x.float(), want.float(), rtol=0.01, atol=0.02)
        _check_the_same(x)


def _numbers(seed: int, rank: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(count, generator=generator).to(_device)


def _check_the_same(x: Tensor) -> None:
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.contiguous())
    assert all(torch.equal(x, other) for other in everyones)


def _over_files(rank: int, size: int, folder: Path) -> peer_sum.PeerSum:
    """As on a GPU, with fewer and smaller blocks, so that some have several rounds and some nothing to do."""
    peer_sum.BLOCKS, peer_sum.BLOCK = 4, 64
    memory = [torch.from_file(f"{folder}/memory-{other}", True, peer_sum.MEMORY_BYTES, dtype=torch.uint8)
              for other in range(size)]  # fmt: skip
    dist.barrier()
    return peer_sum.PeerSum(rank, [one.data_ptr() for one in memory], torch.device("cpu"), memory)


def main() -> None:
    """Runs the rank."""
    global _device
    rank, size, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    _device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(_device)
    group = Group(rank, size, f"{folder}/store", _device)
    group.join()
    sums.connect(group)
    if kind == "cuda":
        assert sums._peers is not None, "these GPUs do not read each other's memory"
        most = peer_sum.CAPACITY // 4
        check_sums(sums._peers, rank, [8, 4096, 4104, most], [torch.bfloat16, torch.float16, torch.float32])
        check_linear(rank, torch.bfloat16)
        check_captured(sums._peers, rank)
    else:
        assert sums._peers is None
        check_linear(rank, torch.float32)
        check_likeliest(rank, size)
        check_sums(_over_files(rank, size, folder), rank, [5, 64, 300, 1000], [torch.float32, torch.float16])
    dist.barrier()


_device = torch.device("cpu")

if __name__ == "__main__":
    main()
