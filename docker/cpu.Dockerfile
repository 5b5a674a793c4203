# syntax=docker/dockerfile:1
# batchrun for driver and workers on CPUs. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t batchrun:0.2.0 .
# PyPI's torch brings CUDA along; --build-arg TORCH_INDEX=... with the CPU wheel index that pytorch.org names on its
# install page makes an image several gigabytes smaller.
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /opt/batchrun
ENV PATH=/opt/batchrun/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/constraints-cpu.txt constraints.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY batchrun batchrun
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt '.[s3,gcs,azure]'

FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home batchrun
COPY --from=build /opt/batchrun /opt/batchrun
ENV PATH=/opt/batchrun/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
USER 10001
WORKDIR /home/batchrun
# tini passes signals on and reaps the engine; `tini -e 3 --` lets "complete, some rows failed" count as success.
ENTRYPOINT ["tini", "--"]
CMD ["batchrun", "--help"]
