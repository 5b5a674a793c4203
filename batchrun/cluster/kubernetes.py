"""Scheduler and workers as pods, through dask-kubernetes."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchrun.cluster.config import optional, refuse_too_few, worker_environment
from batchrun.errors import ClusterError, one_line
from batchrun.job.settings import ClusterSettings

# Seconds that the scheduler's pod has to come up: a node may have to pull an image of gigabytes first.
SCHEDULER_POD = 900


@contextmanager
def kubernetes_cluster(settings: ClusterSettings, gpus: int = 1) -> Iterator[Any]:
    """Scheduler and workers as pods, each with so many `gpus`, by the Dask operator (which has to be installed in the
    cluster).

    Raises:
        ClusterError: dask-kubernetes is not installed, the resources do not fit `gpus`, or no cluster can be reached.
    """
    module = kubernetes_module()
    spec, namespace = kubernetes_spec(settings, gpus), (settings.kubernetes or {}).get("namespace")
    try:
        # Asked first: a KubeCluster that finds nobody prints a traceback of its own when the process ends.
        importlib.import_module("kr8s").api().version()
        cluster = module.KubeCluster(
            custom_cluster_spec=spec, namespace=namespace, resource_timeout=SCHEDULER_POD, quiet=True
        )
    except Exception as error:
        # kr8s, httpx and the operator's own: all mean that there is no cluster.
        fix = "check kubectl's context and that the Dask operator is installed"
        what = one_line(error)
        raise ClusterError(what, "cluster.kubernetes", fix) from None
    with cluster:
        yield cluster


def kubernetes_module() -> Any:
    """dask-kubernetes. Raises ClusterError where it is missing on this machine."""
    return optional("dask_kubernetes.operator", "kubernetes")


def kubernetes_spec(settings: ClusterSettings, gpus: int = 1) -> dict[str, Any]:
    """The DaskCluster resource (kubernetes.dask.org/v1) for the Dask operator.

    Written out here, since dask-kubernetes' own generator gives the scheduler the workers' resources too, so a GPU,
    and starts both by commands that Dask has no more. A worker of several `gpus` is limited to them where the job's own
    resources name none.

    Raises:
        ClusterError: a key that is not known, no image, or fewer GPUs in the job's own resources.
    """
    options = dict(settings.kubernetes or {})
    name = options.pop("name", f"batchrun-{uuid.uuid4().hex[:8]}")
    image, env = options.pop("image", None), options.pop("env", {})
    resources, pod = options.pop("resources", {}), options.pop("pod", {})
    options.pop("namespace", None)
    if options or image is None:
        what = f"unknown {', '.join(options)}" if options else "no image"
        known = "image, name, namespace, resources, env, pod"
        raise ClusterError(what, "cluster.kubernetes", f"it takes {known}; docker/ builds an image")
    variables = [{"name": key, "value": str(value)} for key, value in {**worker_environment(), **env}.items()]
    threads = ["--nthreads", str(settings.slots)]
    worker = {
        "name": "worker",
        "image": image,
        "args": ["dask", "worker", "--name", "$(DASK_WORKER_NAME)", *threads, "--no-dashboard"],
        "env": variables,
        "resources": _with_gpus(resources, gpus),
    }
    probe = {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 10}
    scheduler = {
        "name": "scheduler",
        "image": image,
        "args": ["dask", "scheduler", "--host", "0.0.0.0"],
        "env": variables,
        "ports": [
            {"name": "tcp-comm", "containerPort": 8786, "protocol": "TCP"},
            {"name": "http-dashboard", "containerPort": 8787, "protocol": "TCP"},
        ],
        "readinessProbe": {**probe, "initialDelaySeconds": 5},
        "livenessProbe": {**probe, "initialDelaySeconds": 15},
    }
    labels = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    service = {
        "type": "ClusterIP",
        "selector": labels,
        "ports": [
            {"name": "tcp-comm", "protocol": "TCP", "port": 8786, "targetPort": "tcp-comm"},
            {"name": "http-dashboard", "protocol": "TCP", "port": 8787, "targetPort": "http-dashboard"},
        ],
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "worker": {"replicas": settings.workers or 1, "spec": {**pod, "containers": [worker]}},
            "scheduler": {"spec": {"containers": [scheduler]}, "service": service},
        },
    }


def _with_gpus(resources: dict[str, Any], gpus: int) -> dict[str, Any]:
    limits = resources.get("limits", {})
    # As plugins of all makers name them, slices of GPUs too: nvidia.com/gpu, nvidia.com/mig-3g.40gb, amd.com/gpu.
    asked = [name for name in limits if name.endswith("/gpu") or name.startswith("nvidia.com/")]
    if asked:
        refuse_too_few(int(limits[asked[0]]), gpus, "cluster.kubernetes", f"resources.limits.{asked[0]}")
    elif gpus > 1:
        return {**resources, "limits": {**limits, "nvidia.com/gpu": gpus}}
    return resources
