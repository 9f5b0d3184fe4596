#!/usr/bin/env bash
# CUDA checks of the kernels, the six stages on CPU and GPU, every GPU row of bench/results.csv, and the tile sizes, on a
# bare image, in fifteen minutes: what the time limits below add up to.
#   bash bench/gpu.sh [OUT]                    # logs, tables and rows into OUT (out/gpu)
#   PARTS="kernels tiles" bash bench/gpu.sh    # some parts only: kernels stages figures tiles
#                                              # and, not by default: large (120 s more), quantized (240 s),
#                                              # decoders (60 s; no GPU is wanted), demo (330 s)
#   SKIP="alignment loss" bash bench/gpu.sh    # without these steps
#   CARRIED=1 bash bench/gpu.sh                # the CPU's half of bench/devices.py lies in out/devices already
#   bash bench/gpu.sh --rehearse [OUT]         # no GPU: each step on a CPU, cut small, kernels in Triton's interpreter
# Each step has its own time limit and its own log; one that hangs or fails costs nobody else anything. What is right
# comes first, then what was changed and never timed. The last lines are a summary; the status is 1 if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
REHEARSE=
[ "${1:-}" != --rehearse ] || { REHEARSE=yes && shift; }
OUT=$(realpath -m "${1:-out/gpu}")
PARTS=${PARTS:-kernels stages figures tiles}
mkdir -p "$OUT"
rm -f "$OUT/failed" "$OUT"/*.log
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -f .venv/bin/activate ] || source .venv/bin/activate
if [ "$REHEARSE" ]; then
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' BENCH_RESULTS=$OUT/results.csv
  rm -f "$BENCH_RESULTS"
  echo "a rehearsal on a CPU: no number means anything" | tee "$OUT/summary.txt"
elif python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  export VDG_TEST_GPU=1
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$OUT/summary.txt"
else
  echo "bench/gpu.sh: no GPU here, nothing checked and nothing measured (--rehearse goes through it on a CPU)"
  exit 0
fi
python -c "import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)" | tee -a "$OUT/summary.txt"

step() { # name, seconds, command ... -- what a rehearsal runs in its place
  local name=$1 limit=$2 began=$SECONDS status=0 command=()
  shift 2
  [[ " ${SKIP:-} " != *" $name "* ]] || return 0
  while [ "$1" != -- ]; do command+=("$1") && shift; done
  [ -z "$REHEARSE" ] || { command=("${@:2}") && limit=$((4 * limit)); }
  timeout -k 5 "$limit" "${command[@]}" > "$OUT/$name.log" 2>&1 || status=$?
  [ $status -eq 0 ] || touch "$OUT/failed"
  printf '%-12s status %3d, %4d s   %s\n' "$name" "$status" $((SECONDS - began)) "$(grep -v '^ *$' "$OUT/$name.log" | tail -1 | cut -c1-100)" |
    tee -a "$OUT/summary.txt"
}
wants() { [[ " $PARTS " == *" $1 "* ]]; }
INTERPRET="env TRITON_INTERPRET=1 python"
SWEEP="bench/sweep.py --workers 0 --only"
SMALL="--small 6400 --first 2 --repeats 1"
FEW="(topk_equals and 3-70) or exact_scores or error_of_a_proposal or (half_precision and 260) or (l_tcc_with_bank and 20-0)"
FEW="$FEW or (upper_triangle and 130) or rotary or one_token or taken_rows_and or (at_their_edges and 0.25)"
TESTS="-m pytest -q -p no:cacheprovider tests/triton_kernels.py"

# What is right, and what compiles: many processors and little of the GPU, side by side.
wants kernels && { step kernels 120 python $TESTS -n 6 -- $INTERPRET $TESTS -k "$FEW" & }
wants stages && { step devices 160 python bench/devices.py ${CARRIED:+--part second} -- python bench/devices.py --second cpu --divide 5 & }
wants tiles && { step compile 120 python bench/sweep.py --workers 8 --small 64 --repeats 1 \
  -- $INTERPRET bench/sweep.py --workers 2 --only flash $SMALL & }
wants kernels && { step mining-check 60 python bench/mining.py --device cuda --check 1 \
  -- $INTERPRET bench/mining.py --check 1 --n 33 --d 16 & }
if wants kernels && command -v compute-sanitizer > /dev/null; then  # what reads or writes where it should not
  step sanitizer 150 compute-sanitizer --tool memcheck --error-exitcode 9 python $TESTS -k "$FEW" \
    -- bash -c "echo 'compute-sanitizer wants a GPU: not rehearsed'" &
fi
wait

# What is measured runs alone; first what was changed since it was last timed.
wants tiles && step whole-mining 30 python $SWEEP mining --out "$OUT/whole-mining.csv" \
  -- $INTERPRET $SWEEP mining $SMALL --out "$OUT/whole-mining.csv"
if wants figures; then
  step real-step 80 python bench/real_step.py --device cuda --batch 64 --steps 10 -- python bench/real_step.py --small 6 --steps 3
  step real-views 45 python bench/real_step.py --device cuda --batch 64 --steps 6 --views 2 \
    -- python bench/real_step.py --small 6 --steps 3 --views 2
  step cir-step 50 python bench/cir_step.py --device cuda -- python bench/cir_step.py --small 6 --batch 2 --rounds 1
  step cir-text 30 python bench/cir_step.py --device cuda --text 1 -- python bench/cir_step.py --small 6 --batch 2 --rounds 1 --text 1
  step mining 40 python bench/mining.py --device cuda -- $INTERPRET bench/mining.py --rehearse 1 --n 150 --d 64 --repeats 1
  step loss 45 python bench/loss.py --device cuda -- python bench/loss.py --rehearse 1 --b 600 --d 300 --repeats 1
  step phases 20 python bench/phases.py -- $INTERPRET bench/phases.py --n 24 --d 64 --repeats 0
  step generation 90 python bench/generation.py --device cuda --pairs 512 --rounds 1 --only ours-512,generate-64 \
    -- python bench/generation.py --pairs 16 --rounds 1 --new 4 --only ours-16,generate-64
  step tuning 120 python bench/tuning.py --device cuda --rounds 3 -- python bench/tuning.py --batch 2 --steps 1 --rounds 1
  step tuning-64 110 python bench/tuning.py --device cuda --batch 64 --rounds 3 --only packed,tree,peft \
    -- python bench/tuning.py --batch 3 --steps 1 --rounds 1 --only packed
  step alignment 40 python bench/alignment.py --device cuda --batch 64 \
    -- python bench/alignment.py --batch 2 --steps 1 --rounds 1
fi
wants decoders && step decoders 60 python bench/decoders.py --count 96 -- python bench/decoders.py --count 32
if wants large; then
  step mining-cc3m 120 python bench/mining.py --device cuda --n 595375 --repeats 1 \
    -- $INTERPRET bench/mining.py --rehearse 1 --n 300 --d 64 --repeats 1
fi
if wants quantized; then
  step nf4 120 python bench/tuning.py --device cuda --shape 7b --quantize nf4 --rounds 2 \
    -- python bench/tuning.py --batch 2 --steps 1 --rounds 1 --quantize nf4
  step int8 120 python bench/tuning.py --device cuda --shape 7b --quantize int8 --rounds 2 \
    -- python bench/tuning.py --batch 2 --steps 1 --rounds 1 --quantize int8
fi
wants tiles && step tiles 30 python $SWEEP propose,rotate,one,rows,absorb,sums,merge,flash,strip --out "$OUT/tiles.csv" \
  -- $INTERPRET $SWEEP propose,rotate,one,rows,absorb,sums,merge,flash,strip $SMALL --out "$OUT/tiles.csv"
if wants demo; then
  JOBS=8 step demo 330 bash demo.sh -- bash -c "echo 'demo.sh runs on a CPU as it is: not rehearsed'"
  cp out/demo/metrics.json "$OUT/" 2> /dev/null
fi

[ "$REHEARSE" ] || cp bench/results.csv "$OUT/results.csv"
for log in "$OUT"/*.log; do
  printf '\n==== %s ====\n' "$(basename "$log")"
  tail -n 200 "$log"
done > "$OUT/all-logs.txt"
echo && cat "$OUT/summary.txt"
[ ! -f "$OUT/failed" ]
