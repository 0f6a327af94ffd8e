#!/usr/bin/env bash
# Installs the clients that tests/clients calls the ingress with: `make clients`, after `make setup`. Does nothing when
# nothing changed.
#
# .venv-clients       from requirements/clients.lock; their needs do not go with those of .venv
# .venv-clients/node  from tests/clients/node/package-lock.json; left out with a word where there is no npm
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-clients
node="$venv/node"
packages=(tests/clients/node/package.json tests/clients/node/package-lock.json)

key() { # what it is made from
  { "$1" --version && pwd && cat "${@:2}" scripts/clients.sh; } | sha256sum
}

made="$(key .venv/bin/python requirements/clients.lock)"
if [[ "$(cat "$venv/.stamp" 2>/dev/null)" != "$made" ]]; then
  echo "clients: installing requirements/clients.lock into $venv (about 0.5 GiB on disk)"
  rm -rf "$venv"
  .venv/bin/uv venv --quiet --python .venv/bin/python "$venv"
  .venv/bin/uv pip sync --quiet --python "$venv/bin/python" --require-hashes requirements/clients.lock
  echo "$made" >"$venv/.stamp"
fi

if ! command -v npm >/dev/null; then
  echo "clients: no npm here; the tests of clients for Node will skip"
  exit 0
fi
made="$(key node "${packages[@]}")"
if [[ "$(cat "$node/.stamp" 2>/dev/null)" != "$made" ]]; then
  echo "clients: installing tests/clients/node/package-lock.json into $node"
  rm -rf "$node"
  mkdir "$node"
  cp "${packages[@]}" "$node"
  # Their scripts are not run: what they would fetch or build, nothing here needs.
  (cd "$node" && npm ci --ignore-scripts --no-audit --no-fund --silent)
  echo "$made" >"$node/.stamp"
fi
