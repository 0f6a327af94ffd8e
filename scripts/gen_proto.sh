#!/bin/sh
# Generate the Python code of the gRPC ingress from its .proto; into the tree, or into the folder named.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root}
cd "$root"
PATH="$root/.venv/bin:$PATH"
exec python -m grpc_tools.protoc --proto_path=. \
  --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
  hycluster/ingress/proto/inference.proto
