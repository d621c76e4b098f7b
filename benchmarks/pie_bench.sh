#!/usr/bin/env bash
# Run the presets of conf/experiment/pie over PIE-Bench, on from where they stopped, and write the table "published /
# reproduced":  [rows="ddim_masactrl pnp_masactrl"] benchmarks/pie_bench.sh PIE-Bench_v1 runs/pie [SETTING OF edit.py ...]
# With task.shard=0/4 it is a quarter; run the others beside it, on other GPUs.
set -euo pipefail
folder=$(realpath "$1") out=$(realpath -m "$2") settings=("${@:3}")
cd "$(dirname "$0")/.."
for row in ${rows:-$(cd conf/experiment/pie && ls ./*.yaml)}; do
    row=$(basename "$row" .yaml)
    python edit.py +experiment="pie/$row" task.path="$folder" hydra.run.dir="$out/$row" "${settings[@]}" ||
        echo "pie/$row ended with errors, see $out/$row" >&2
done
python -m benchmarks.pie_bench "$folder" "$out" && cat "$out/table.md"
