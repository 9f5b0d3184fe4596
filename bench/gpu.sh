#!/usr/bin/env bash
# First light on a GPU, in eight minutes on a bare image: CUDA checks of the kernels, the six stages on the drawn world,
# every GPU row of bench/results.csv, and the tile sizes.
#   bash bench/gpu.sh [OUT]                    # logs, tables and the demo's metrics into OUT (out/gpu)
#   PARTS="kernels tiles" bash bench/gpu.sh    # some parts only: kernels stages figures tiles
# Each step has its own time limit and its own log; one that hangs or fails costs nobody else anything. The last lines
# are a summary. What the demo draws is kept: a world in OUT/world.tar (made on the CPU before) saves a minute.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-out/gpu}")
PARTS=${PARTS:-kernels stages figures tiles}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD HF_HUB_OFFLINE=1
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -f .venv/bin/activate ] || source .venv/bin/activate
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "bench/gpu.sh: no GPU here, nothing checked and nothing measured"
  exit 0
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$OUT/summary.txt"
python -c "import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)" | tee -a "$OUT/summary.txt"

step() { # name, seconds, command ...
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
  printf '%-12s status %3d, %4d s   %s\n' "$name" "$status" $((SECONDS - began)) "$(grep -v '^ *$' "$OUT/$name.log" | tail -1 | cut -c1-100)" |
    tee -a "$OUT/summary.txt"
}
wants() { [[ " $PARTS " == *" $1 "* ]]; }

# What needs many processors and little of the GPU runs side by side.
wants kernels && { step kernels 200 python -m pytest -n 6 -q -p no:cacheprovider tests/triton_kernels.py & }
wants stages && { step devices 150 python bench/devices.py & }
wants stages && { JOBS=8 step demo 330 bash demo.sh & }
wants tiles && { step compile 200 python bench/sweep.py --workers 8 --small 64 --repeats 1 & }
wait

# What is measured runs alone.
wants kernels && step mining-check 60 python bench/mining.py --device cuda --check 1
if wants figures; then
  step phases 60 python bench/phases.py
  step mining 60 python bench/mining.py --device cuda
  step loss 60 python bench/loss.py --device cuda
  step generation 120 python bench/generation.py --device cuda --only ours-128,ours-64,generate-64,generate-8,release-8
  step tuning 120 python bench/tuning.py --device cuda
fi
wants tiles && step tiles 120 python bench/sweep.py --workers 0 --out "$OUT/tiles.csv"
cp bench/results.csv "$OUT/results.csv"
cp out/demo/metrics.json "$OUT/" 2> /dev/null
for log in "$OUT"/*.log; do
  printf '\n==== %s ====\n' "$(basename "$log")"
  tail -n 200 "$log"
done > "$OUT/all-logs.txt"
echo && cat "$OUT/summary.txt"
