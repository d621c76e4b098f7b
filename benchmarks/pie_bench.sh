#!/usr/bin/env bash
# Run every preset of conf/experiment/pie over PIE-Bench, and write the table "published against reproduced".
#
#   benchmarks/pie_bench.sh PIE-Bench_v1 runs/pie                  goes on where it stopped
#   benchmarks/pie_bench.sh PIE-Bench_v1 runs/pie task.shard=0/4   a quarter; run the others beside it, on other GPUs
#
# Further settings go to edit.py: task.limit=5, model.weights=sd-v1-4.ckpt, rows="ddim_masactrl pnp_masactrl" before it.
set -euo pipefail
folder=$(realpath "$1") out=$(realpath -m "$2") settings=("${@:3}")
cd "$(dirname "$0")/.."
for row in ${rows:-$(cd conf/experiment/pie && ls ./*.yaml)}; do
    row=$(basename "$row" .yaml)
    python edit.py +experiment="pie/$row" task.path="$folder" hydra.run.dir="$out/$row" "${settings[@]}" ||
        echo "pie/$row ended with errors, see $out/$row" >&2
done
python -m benchmarks.pie_bench "$folder" "$out" && cat "$out/table.md"
