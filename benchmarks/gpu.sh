#!/usr/bin/env bash
# Test and time everything that needs a CUDA GPU, in six minutes at most: tables and JSON go into FOLDER.
#
#   bash benchmarks/gpu.sh FOLDER [PYTHON]
#
# Needs torch, triton, einops, open_clip, timm and hydra; for the tests pytest, faster with pytest-xdist. Each part is a
# process with a time limit of its own and writes each row at once, so a failure loses only what follows it in that part.
# Ends with 1 if a part failed. PALIMPSEST_SMALL=1 tries the script with tiny networks, also on a CPU.
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
    timeout --kill-after=5 "$limit" "$python" -m "$@" 2>&1 | tee "$folder/${name// /-}.log"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "== $name FAILED"; failed=1; }
    echo "== $name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/card.txt"
"$python" -c "import xdist" 2>/dev/null && workers="-n 6" || workers=""
# shellcheck disable=SC2086 # two words or none
part tests 100 pytest -q $workers tests/test_gpu.py tests/test_fused_attention.py
part "steps sd15" 50 benchmarks.unet --models sd15 --modes eager graph --attentions sdpa fused
part imagic 60 benchmarks.edits --stages sd15
part "steps sdxl" 45 benchmarks.unet --models sdxl --modes eager graph
part "steps sd35" 45 benchmarks.unet --models sd35 --modes eager graph
part attention 60 benchmarks.attention
part "compiled sd15" 90 benchmarks.unet --models sd15 --steps guided all --modes compiled
part "steps shipped" 90 benchmarks.unet --modes eager graph compiled
part "imagic compiled" 120 benchmarks.edits --stages sd15 --compiled
exit $failed
