# syntax=docker/dockerfile:1
# batchrun for workers on NVIDIA GPUs (driver for CUDA 13 on the machine). From the repository's root:
#   docker build -f docker/gpu.Dockerfile -t batchrun:0.2.0-gpu .
# torch brings CUDA's libraries itself, so that the base image without them is enough.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The distribution's own patch releases are wanted, so these packages are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/batchrun
WORKDIR /src
ENV PATH=/opt/batchrun/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/constraints-gpu.txt constraints.txt
# The largest layer, which changes least.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY batchrun batchrun
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt '.[gpu,s3,gcs,azure]'

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# gcc and Python's headers: Triton compiles a launcher for each of its kernels, at their first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home batchrun
COPY --from=build /opt/batchrun /opt/batchrun
# What torch and Triton compile lies beside the weights: a volume there keeps both from start to start.
ENV PATH=/opt/batchrun/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/home/batchrun/.cache/torchinductor \
    TRITON_CACHE_DIR=/home/batchrun/.cache/triton \
    DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
USER 10001
WORKDIR /home/batchrun
ENTRYPOINT ["tini", "--"]
CMD ["batchrun", "--help"]
