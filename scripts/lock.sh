#!/usr/bin/env bash
# Writes requirements/*.lock anew from pyproject.toml. cpu.lock: exact versions and hashes, for every Python and
# machine that [tool.uv] in pyproject.toml names. gpu.lock: exact versions of the GPU image (x86_64), for the Dockerfile. Versions move only where they must, or all with UPGRADE=1.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/uv pip compile pyproject.toml \
  --extra cpu --extra demo --extra dev \
  --universal --python-version 3.11 --generate-hashes --no-emit-package torch \
  ${UPGRADE:+--upgrade} --custom-compile-command "make lock" --quiet -o requirements/cpu.lock
echo "requirements/cpu.lock: $(grep -c '^[a-z].*==' requirements/cpu.lock) packages"

.venv/bin/uv pip compile pyproject.toml --no-config \
  --extra gpu \
  --python-platform x86_64-manylinux_2_28 --python-version 3.11 --no-annotate \
  ${UPGRADE:+--upgrade} --custom-compile-command "make lock" --quiet -o requirements/gpu.lock
echo "requirements/gpu.lock: $(grep -c '^[a-z].*==' requirements/gpu.lock) packages"
