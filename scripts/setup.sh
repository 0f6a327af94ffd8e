#!/usr/bin/env bash
# Makes .venv from requirements/: `make setup`. Does nothing when nothing changed; an interrupted one starts over.
#
# PYTHON         interpreter to use; by default the first of python3, python3.13, python3.12, python3.11 that fits
# TORCH_INDEX_URL  where torch's CPU build comes from if pip does not find it by itself
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_INDEX_URL="${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
venv="$PWD/.venv"
stamp="$venv/.setup-stamp"

fail() {
  echo "setup: $*" >&2
  exit 2
}

fits() { # the bounds are those of requires-python in pyproject.toml
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

version() {
  "$1" --version 2>/dev/null || echo "no such command"
}

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    fits "$PYTHON" || fail "PYTHON: $PYTHON is not a Python from 3.11 to 3.13 (it is: $(version "$PYTHON"))"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python from 3.11 to 3.13 found (python3 is: $(version python3)); install one, or set PYTHON=/path/to/it"
}

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64 | Linux-aarch64) ;;
  *) fail "$(uname -s) on $(uname -m): the CPU build of vLLM is for Linux on x86_64 or aarch64" ;;
esac

# Two at once (make test beside make serve) would break each other's installation.
if command -v flock >/dev/null; then
  exec 9>.setup.lock
  flock 9
fi

python="$(find_python)"
# A venv does not survive a move, so its place is part of what it was made from.
key="$(
  {
    "$python" -VV
    echo "$venv"
    cat requirements/cpu.lock requirements/dev.lock requirements/torch-cpu.txt pyproject.toml scripts/setup.sh
  } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
)"
if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]]; then
  exit 0
fi

# No stamp: never finished. Another interpreter: can't be updated.
if [[ -d "$venv" ]] && { [[ ! -f "$stamp" ]] || [[ "$("$venv/bin/python" -VV 2>&1)" != "$("$python" -VV)" ]]; }; then
  echo "setup: removing an unfinished or outdated .venv"
  rm -rf "$venv"
fi
rm -f "$stamp"
if [[ ! -d "$venv" ]]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; install it (on Debian and Ubuntu: the package python3-venv)"
  "$python" -m venv "$venv"
fi

install() {
  "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps "${quiet[@]}" "$@"
}
quiet=(--quiet)
[[ -t 1 ]] && quiet=()

echo "setup: installing requirements/cpu.lock and dev.lock into .venv (about 3 GiB on disk, some minutes)"
install -r requirements/cpu.lock -r requirements/dev.lock
echo "setup: installing torch"
install -r requirements/torch-cpu.txt 2>/dev/null || install --index-url "$TORCH_INDEX_URL" -r requirements/torch-cpu.txt
echo "setup: installing hycluster"
# setuptools warns at length of what an editable installation always is.
PYTHONWARNINGS=ignore install --no-build-isolation -e .

echo "$key" >"$stamp"
echo "setup: done, .venv/bin/hycluster is ready"
