#!/usr/bin/env bash
# Writes requirements/*.lock anew from pyproject.toml: exact versions with hashes. Versions move only where they must, or
# all with UPGRADE=1.
#
# cpu.lock  what serves on CPUs, for every Python and machine that [tool.uv] in pyproject.toml names
# dev.lock  what tests and checks need beside it
# uv.lock   of that the tool that installs them, for the image
# gpu.lock  what serves on GPUs, for the image (x86_64)
# clients.lock, and tests/clients/node/package-lock.json: clients that tests call the service with (scripts/clients.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
python=3.11

compile() { # lock, options
  local lock="requirements/$1"
  shift
  .venv/bin/uv pip compile pyproject.toml --python-version "$python" --generate-hashes --excludes "$left_out" "$@" \
    ${UPGRADE:+--upgrade} --custom-compile-command "make lock" --quiet -o "$lock"
  echo "$lock: $(grep -c '^[a-z].*==' "$lock") packages"
}

left_out=requirements/left-out.txt
cpu=(--universal --excludes requirements/left-out-cpu.txt --extra cpu --extra demo --extra postgres --no-emit-package torch)
compile cpu.lock "${cpu[@]}"
# The whole that tests need, less what is in cpu.lock already, in its versions.
served="$(mktemp)"
called="$(mktemp)"
trap 'rm -f "$served" "$called"' EXIT
grep -oE '^[a-z0-9][a-z0-9.-]*==[^ ]+' requirements/cpu.lock >"$served"
mapfile -t names < <(cut -d= -f1 "$served")
# What serving leaves out, and tests call it with.
grep -vx anthropic "$left_out" >"$called"
left_out="$called" compile dev.lock "${cpu[@]}" --extra dev --constraints "$served" "${names[@]/#/--no-emit-package=}"
awk 'NR <= 2 || /^uv==/ { print; entry = /\\$/ } entry && /^ / { print; entry = /\\$/ }' requirements/dev.lock >requirements/uv.lock
# Without [tool.uv]: its torch is the CPU's.
compile gpu.lock --no-config --excludes requirements/left-out-gpu.txt --extra gpu --extra postgres --python-platform x86_64-manylinux_2_28

.venv/bin/uv pip compile requirements/clients.in --universal --python-version "$python" --generate-hashes \
  ${UPGRADE:+--upgrade} --custom-compile-command "make lock" --quiet -o requirements/clients.lock
echo "requirements/clients.lock: $(grep -c '^[a-z].*==' requirements/clients.lock) packages"
if command -v npm >/dev/null; then
  # Without addresses: whoever installs has a registry of his own.
  (cd tests/clients/node && npm "$([ -n "${UPGRADE:-}" ] && echo update || echo install)" --package-lock-only --ignore-scripts \
    --omit-lockfile-registry-resolved --no-audit --no-fund --silent)
fi
