#!/usr/bin/env bash
# Writes requirements/cpu.lock anew from pyproject.toml: exact versions and hashes, for every Python and
# machine that [tool.uv] in pyproject.toml names. Versions move only where they must, or all with UPGRADE=1.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/uv pip compile pyproject.toml \
  --extra cpu --extra demo --extra dev \
  --universal --python-version 3.11 --generate-hashes --no-emit-package torch \
  ${UPGRADE:+--upgrade} --custom-compile-command "make lock" --quiet -o requirements/cpu.lock
echo "requirements/cpu.lock: $(grep -c '^[a-z].*==' requirements/cpu.lock) packages"
