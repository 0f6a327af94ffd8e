# One image for head, doors, engines and jobs, on CPU or GPU:
#   docker build -t hycluster:0.1.0-cpu .
#   docker build -t hycluster:0.1.0-gpu --build-arg HARDWARE=gpu .
# CUDA comes with vLLM's wheels and the driver with the node, so both begin at the same small base.
# Versions: Python by its tag (pin it to a digest in your registry), packages by requirements/*.lock.
ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS build
ARG HARDWARE=cpu
ARG UV=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 VIRTUAL_ENV=/opt/hycluster
WORKDIR /src
RUN pip install --no-cache-dir "uv==${UV}" && uv venv "$VIRTUAL_ENV"
# What is heavy and seldom changes comes before what changes daily.
COPY pyproject.toml README.md ./
COPY requirements requirements
RUN mkdir hycluster && touch hycluster/__init__.py \
 && case "$HARDWARE" in \
      cpu) uv pip install --torch-backend cpu --constraint requirements/cpu.lock '.[cpu,demo]' ;; \
      gpu) uv pip install --no-config --constraint requirements/gpu.lock '.[gpu]' ;; \
      *) echo "HARDWARE: '$HARDWARE' must be cpu or gpu" >&2; exit 2 ;; \
    esac
COPY hycluster hycluster
RUN uv pip install --no-deps --reinstall-package hycluster .

FROM python:${PYTHON}
ARG HARDWARE=cpu
# bash and wget: KubeRay's commands and probes. The compiler is Triton's, which builds kernels while it runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libnuma1 wget \
 && if [ "$HARDWARE" = gpu ]; then apt-get install -y --no-install-recommends g++; fi \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home hycluster
COPY --from=build /opt/hycluster /opt/hycluster
# Settings and jobs are named relative to the repository's root, here as there.
WORKDIR /srv/hycluster
COPY deployments deployments
COPY jobs jobs
ENV PATH=/opt/hycluster/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
EXPOSE 8000 9000
# Outside of Kubernetes; KubeRay has a command of its own.
CMD ["hycluster", "serve"]
