#!/usr/bin/env bash
# Test and time all that needs a CUDA GPU, in six minutes: bash benchmarks/gpu.sh FOLDER [PYTHON]
#
# Needs torch, triton, einops, open_clip, timm, hydra and pytest; pytest-xdist makes the tests faster, pandas and
# matplotlib make plots. Each part is a process with its own time limit and writes each row at once, so a failure loses
# what follows in that part. Ends with 1 if a part failed. PALIMPSEST_SMALL=1 tries it with tiny networks, on a CPU too.
folder=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd) || exit 1
python=${2:-python}
cd "$(dirname "$0")/.." || exit 1
export PALIMPSEST_BENCHMARKS=$folder
end=$((SECONDS + 355)) failed=0

part() { # name, seconds, a module and its arguments
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -ge 5 ] || { echo "== $name: no time is left"; failed=1; return; }
    echo "== $name, in $limit s at most"
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) timeout --kill-after=5 "$limit" "$python" -m "$@" 2>&1 | tee "$folder/${name// /-}.log"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "== $name FAILED"; failed=1; }
    echo "== $name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/card.txt"
"$python" -c "import xdist" 2>/dev/null && export PYTEST_ADDOPTS="-n 6"
part tests 100 pytest -q tests/test_gpu.py tests/test_fused_attention.py
part "steps sd15" 60 benchmarks.unet --models sd15 --modes plain eager graph fused fused-graph
part imagic 60 benchmarks.edits --stages sd15
part attention 60 benchmarks.attention
part "steps sdxl" 45 benchmarks.unet --models sdxl --modes plain eager graph
part "steps sd35" 45 benchmarks.unet --models sd35 --modes eager graph
part "compiled sd15" 90 benchmarks.unet --models sd15 --steps guided --modes compiled plain-compiled
part "steps shipped" 90 benchmarks.unet --modes plain eager graph compiled
part "imagic compiled" 120 benchmarks.edits --stages sd15 --compiled
exit $failed
