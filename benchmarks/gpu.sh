#!/usr/bin/env bash
# Train and merge on one GPU: tokens per second and memory. Without one it says so and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU is to be seen here, so nothing was run"
    exit 0
fi
exec python benchmarks/gpu.py
