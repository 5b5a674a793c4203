"""Images and manifests: linted, checked against schemas, and their commands run as processes of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pyarrow.parquet as pq
import pytest
import s3fs
import yaml
from fleet import Fleet
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import batchrun as library
from jobs import environment

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say_and_nobody_is_root(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    ran = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    text = path.read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001"]
    ignored = (DOCKER / f"{path.name}.dockerignore").read_text().split()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), f"{name} is copied and does not exist"
            assert any(name.startswith(word[1:].split("*")[0]) for word in ignored if word[0] == "!"), name


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_requirement_is_pinned_in_the_images_to_a_version_that_the_package_allows(name: str) -> None:
    import tomllib

    lines = (DOCKER / f"constraints-{name}.txt").read_text().split()
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["s3"], *extras["gcs"], *extras["azure"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def test_every_image_has_the_packages_version() -> None:
    for path in [*DOCKER.glob("*.yaml"), *(ROOT / "jobs/schedules").glob("*.yaml")]:
        for tag in re.findall(r"image: batchrun:(\S+)", path.read_text()):
            assert tag.removesuffix("-gpu") == library.__version__, path.name


def test_kubernetes_manifests_fit_the_schemas_and_each_other() -> None:
    documents = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.32", strict=True)
    service = next(document for document in documents if document["kind"] == "Service")
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    pods = {
        document["metadata"]["name"]: document["spec"]["template"]
        for document in documents if "template" in document["spec"]
    }  # fmt: skip
    assert pods["batchrun-scheduler"]["metadata"]["labels"] == service["spec"]["selector"]
    assert address in pods["batchrun-workers"]["spec"]["containers"][0]["args"]
    assert f"--address={address}" in pods["batchrun"]["spec"]["containers"][0]["command"]


def test_compose_services_wait_for_services_that_exist() -> None:
    services = compose()
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        if "worker" in service.get("command", []):
            assert service["deploy"]["replicas"] == 2
    file = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    schema_keys = {"name", "services", "x-batchrun"}
    assert set(file) == schema_keys


@pytest.mark.timeout(600)
def test_what_compose_starts_works_together(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = compose()
    fleet = Fleet(tmp_path)
    port = _free_port()

    def here(words: list[str]) -> list[str]:
        """The same command outside containers: services by their loopback addresses, jobs where they lie."""
        text = [word.replace("tcp://scheduler:8786", f"tcp://127.0.0.1:{port}").replace("/jobs/", f"{ROOT}/jobs/")
                .replace("8786", str(port)).replace("0.0.0.0", "127.0.0.1") for word in words]  # fmt: skip
        module = {"python": [], "dask": ["-m", "dask"], "batchrun": ["-m", "batchrun"]}[text[0]]
        return [sys.executable, *module, *text[1:]]

    own = {**services["job"]["environment"], "AWS_ENDPOINT_URL": endpoint}
    for name, value in environment(**own).items():
        monkeypatch.setenv(name, value)
    try:
        subprocess.run(here(services["input"]["command"]), check=True, env=os.environ, cwd=tmp_path)
        for name, count in (("scheduler", 1), ("worker", services["worker"]["deploy"]["replicas"])):
            for _ in range(count):
                fleet.start(name, here(services[name]["command"]))
        small = [
            "--set=engine.kind=batchrun.engine.instant:InstantEngine",
            "--set=answer={}",
            "--set=input.limit=600",
        ]
        ran = subprocess.run(
            here([*services["job"]["command"], *small]),
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stderr
    finally:
        fleet.stop()
    lake = s3fs.S3FileSystem(endpoint_url=endpoint, key="example", secret="example-secret")
    parts = sorted(lake.glob("lake/answers/data/*.parquet"))
    assert sum(pq.read_metadata(lake.open(part)).num_rows for part in parts) == 600


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
