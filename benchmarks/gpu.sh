#!/usr/bin/env bash
# Test and time everything that needs a CUDA GPU, in ten minutes at most; results in benchmarks/results/*-CARD.{md,json}.
#
#   bash benchmarks/gpu.sh [PYTHON]
#
# Each stage has a time limit of its own and writes each row at once, so that a failure loses only what follows it in
# that stage. Ends with 1 if a stage failed.
cd "$(dirname "$0")/.." || exit 1
python=${1:-python}
failed=0

stage() { # name, seconds, command
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    timeout --kill-after=5 "$limit" "$@" || { echo "== $name FAILED ($?)"; failed=1; }
    echo "== $name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
stage "GPU tests" 200 "$python" -m pytest -q tests/test_gpu.py tests/test_fused_attention.py
stage "attention" 70 "$python" -m benchmarks.attention
stage "steps" 100 "$python" -m benchmarks.unet --models sd15 --modes eager graph
stage "steps, shipped model" 40 "$python" -m benchmarks.unet --models openmoji64 --modes eager graph
stage "steps, compiled" 150 "$python" -m benchmarks.unet --models sd15 --steps guided --modes compiled
exit $failed
