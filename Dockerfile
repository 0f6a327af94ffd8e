# One image for head, ingress, engines and jobs, on CPU or GPU:
#   docker build -t hycluster:0.1.0-cpu .
#   docker build -t hycluster:0.1.0-gpu --build-arg HARDWARE=gpu .
# CUDA comes with vLLM's wheels and the driver with the node, so both begin at the same small base.
# Versions: Python by its tag (pin it to a digest in your registry), packages by requirements/*.lock.
ARG PYTHON=3.11.13-slim-bookworm

# What is heavy and seldom changes: a layer of its own, made from the locks alone.
FROM python:${PYTHON} AS packages
ARG HARDWARE=cpu
# PyPI does not have torch's CPU build, so its hash can't be in the lock.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Bytecode is made here, for nothing can be written where it runs, and is never compared with its source: copies and
# registries may change files' times.
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    VIRTUAL_ENV=/opt/hycluster
WORKDIR /opt/source
COPY requirements requirements
RUN pip install --no-cache-dir --require-hashes --no-deps -r requirements/uv.lock && uv venv "$VIRTUAL_ENV"
RUN case "$HARDWARE" in \
      cpu | gpu) ;; \
      *) echo "HARDWARE: '$HARDWARE' must be cpu or gpu" >&2; exit 2 ;; \
    esac \
 && uv pip install --no-deps --require-hashes -r "requirements/$HARDWARE.lock" \
 && if [ "$HARDWARE" = cpu ]; then \
      uv pip install --no-deps --index "$TORCH_INDEX_URL" -r requirements/torch-cpu.txt; \
    fi

# What changes daily: a wheel, from nothing but the sources, laid over the packages.
FROM packages AS project
COPY pyproject.toml README.md LICENSE ./
COPY hycluster hycluster
RUN uv build --wheel --no-build-isolation --python "$VIRTUAL_ENV" --out-dir /opt/wheel \
 && uv pip install --no-deps --offline --prefix /opt/project /opt/wheel/*.whl

FROM python:${PYTHON}
ARG HARDWARE=cpu
# wget (and bash): KubeRay's commands and probes. On GPUs: the compiler is Triton's, which builds kernels while it runs;
# NCCL looks for InfiniBand and RoCE in libibverbs and its providers, and is silent where they are missing.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libnuma1 wget \
 && if [ "$HARDWARE" = gpu ]; then \
      apt-get install -y --no-install-recommends g++ ibverbs-providers ibverbs-utils libibverbs1 librdmacm1; \
    fi \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home hycluster \
 # Where the platform gives each namespace a user of its own, that user's group is 0.
 && chgrp 0 /home/hycluster && chmod 0770 /home/hycluster
COPY --from=packages /opt/hycluster /opt/hycluster
COPY --from=project /opt/project /opt/hycluster
# Settings and jobs are named relative to the repository's root, here as there.
WORKDIR /srv/hycluster
COPY LICENSE ./
COPY requirements/licences.md ./
COPY deployments deployments
COPY jobs jobs
# The user by name, for one that /etc/passwd does not know.
ENV PATH=/opt/hycluster/bin:$PATH HOME=/home/hycluster USER=hycluster \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hycluster" \
      org.opencontainers.image.description="Serves mixture-of-experts language models on Ray and vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      hycluster.hardware="$HARDWARE"
USER 1000:1000
EXPOSE 8000 9000
# Outside of Kubernetes; KubeRay has a command of its own.
CMD ["hycluster", "serve"]
