"""Models that many tests use, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch reads them, here and in engines: many processes share few cores, and threads that wait would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import warm
from distributed import Client
from faulty_jobs import Setting
from hypothesis import HealthCheck, settings
from tiny_models import make_model

from batchrun.cluster import connect
from batchrun.job.settings import ClusterSettings
from jobs import environment

# A busy machine makes any example late, and any that takes long to draw. A commit has the same examples whenever it is
# tested; others, with `--hypothesis-profile random`.
_slow: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_slow)
settings.register_profile("random", **_slow)
settings.load_profile("same")

warm.begin()
warm.fork_workers()

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whichever test


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer llama and its byte tokenizer."""
    return make_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Client]:
    """A client of a local cluster that many runs share; its worker finds the tests' own engines."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    try:
        with connect(ClusterSettings()) as client:
            yield client
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture
def setting(tmp_path: Path, tiny_llama: Path, cluster: Client) -> Iterator[Callable[..., Setting]]:
    """Makes a job of two partitions with the engine of `faulty_engines` that is named; see `Setting`."""
    made: list[Setting] = []

    def make(engine: str, **sections: Any) -> Setting:
        made.append(Setting(tmp_path, tiny_llama, cluster, engine, **sections))
        return made[-1]

    yield make
    for one in made:
        one.forget()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The address of an S3 server on this machine, without buckets."""
    from moto.server import ThreadedMotoServer  # a second, and not every machine that runs tests has it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
