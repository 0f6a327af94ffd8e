#!/usr/bin/env bash
# Line coverage of hycluster/ by the tests that start no cluster of processes (mark `cluster`): `make coverage`.
#
# What tests start as subprocesses and Ray's workers and actors count too, unless they are killed by SIGKILL. It is apart
# from `make test` because tracing makes the import of vLLM take half as much CPU time again (Python before 3.12 can't
# trace by sys.monitoring), and the tests with clusters import it a hundred times. Arguments are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
# Also for an ordinary user to whom all but the temporary folder is read-only (tests/ordinary_user.py).
chmod 755 "$folder"
export COVERAGE_FILE="$folder/data"
.venv/bin/coverage run -m pytest -n "${WORKERS:-2}" -q -m "not cluster" "$@"
.venv/bin/coverage combine --quiet
.venv/bin/coverage report
