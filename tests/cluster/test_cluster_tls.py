"""Who may talk to the workers: nobody but the run itself on this machine, holders of a certificate elsewhere."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from distributed import Client
from distributed.security import Security

from batchrun.cluster import connect
from batchrun.errors import ClusterError, JobError
from batchrun.job.job import Job
from batchrun.job.settings import ClusterSettings, TlsSettings


def test_a_local_cluster_listens_on_loopback_only_and_to_its_own_run_only() -> None:
    with connect(ClusterSettings()) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert all(worker.startswith("tls://127.0.0.1:") for worker in client.scheduler_info()["workers"])
        me = psutil.Process()
        listening = [
            connection.laddr.ip
            for process in [me, *me.children(recursive=True)]
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 2
        assert set(listening) == {"127.0.0.1"}
        for stranger in (None, Security.temporary()):
            with pytest.raises(
                (OSError, ValueError, TypeError), match=r"(?i)time|tls|ssl|certificate|reset|closed"
            ):
                Client(address, security=stranger, timeout="3s", set_as_default=False)
            gc.collect()  # a failed client's finalizer takes a lock, which must not happen under that very lock
        with pytest.raises(OSError, match=r"(?i)time|reset|closed"):
            Client(address.replace("tls:", "tcp:"), timeout="3s", set_as_default=False)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """A certificate that signs itself, as the files that an administrator hands out."""
    folder = tmp_path_factory.mktemp("tls")
    made = Security.temporary()
    (folder / "cert.pem").write_text(made.tls_client_cert)
    (folder / "key.pem").write_text(made.tls_client_key)
    return TlsSettings(
        ca=str(folder / "cert.pem"), cert=str(folder / "cert.pem"), key=str(folder / "key.pem")
    )


@pytest.fixture(scope="module")
def scheduler(tls: TlsSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler that asks for certificates."""
    file = tmp_path_factory.mktemp("scheduler") / "scheduler.json"
    command = [
        sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1", "--port", "0",
        "--tls-ca-file", tls.ca, "--tls-cert", tls.cert, "--tls-key", tls.key, "--no-dashboard",
        "--scheduler-file", str(file),
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text().endswith("}"):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield json.loads(file.read_text())["address"]
    running.terminate()
    running.wait(10)


def test_a_scheduler_behind_tls_is_reached_with_a_certificate(scheduler: str, tls: TlsSettings) -> None:
    with connect(ClusterSettings(address=scheduler, tls=tls)) as client:
        assert client.scheduler_info()["workers"] == {}


def test_files_that_hold_no_certificate_are_named(scheduler: str, tls: TlsSettings, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for wrong in ("missing.pem", "empty.pem"):
        settings = ClusterSettings(
            address=scheduler, tls=tls.model_copy(update={"cert": str(tmp_path / wrong)})
        )
        with (
            pytest.raises(ClusterError, match=r"cluster\.tls: its certificates cannot be loaded"),
            connect(settings),
        ):
            pass


JOB = """
input: {path: in.parquet}
prompt: {template: x}
model: {name: m}
output: {path: out}
cluster: %s
"""


def test_tls_files_lie_beside_the_job_file(tmp_path: Path) -> None:
    text = JOB % "{address: 'tls://far:8786', tls: {ca: ca.pem, cert: /etc/cert.pem, key: key.pem}}"
    cluster = Job.parse(text, base=tmp_path).cluster
    assert cluster.tls == TlsSettings(
        ca=str(tmp_path / "ca.pem"), cert="/etc/cert.pem", key=str(tmp_path / "key.pem")
    )


@pytest.mark.parametrize("address", ["", "address: 'tcp://far:8786', "])
def test_certificates_without_an_address_for_them_are_refused(address: str) -> None:
    with pytest.raises(JobError, match="tls is for an address"):
        Job.parse(JOB % f"{{{address}tls: {{ca: a, cert: b, key: c}}}}")
