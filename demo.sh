#!/usr/bin/env bash
# The whole road on the embedded world: draw, align, tune, mine, generate, train, evaluate, report.
#   ./demo.sh            -> out/demo/{index.html, metrics.json}, the committed default seed
#   ./demo.sh --seed 1   -> out/demo-seed-1: another world, other triplets, other weights, other samples
#   ./demo.sh --world photos --data FOLDER [--llm FOLDER]   product photographs, a pretrained LLM: see demo/photos.sh
# Every line below is a stage with its public flags (those of steps 5 and 6 stand in demo/rows.sh); copy one to play with
# it. Sizes are flags, nothing else is special.
set -euo pipefail
if [ "${1:-} ${2:-}" = "--world photos" ]; then
  shift 2
  exec "$(dirname "$0")/demo/photos.sh" "$@"
fi
cd "$(dirname "$0")"
SEED=0
OUT=out/demo
if [ "${1:-}" = "--seed" ] && [ -n "${2:-}" ]; then
  SEED=$2
  [ "$SEED" = 0 ] || OUT=out/demo-seed-$SEED
elif [ $# -gt 0 ]; then
  echo "usage: ./demo.sh [--seed N], or ./demo.sh --world photos --data FOLDER [--llm FOLDER] [--seed N]" >&2
  exit 1
fi
if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -f "$OUT/.demo" ]; then
  echo "error: $OUT holds something that this script did not write; move it away, or remove it if it is an old demo" >&2
  exit 1
fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c "import numpy, PIL, torch, tqdm, transformers, triton" 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
M=demo/models W=$OUT/world
# A demo starts anew: what an earlier one wrote goes, anything else in its folder stays.
mkdir -p "$OUT"
touch "$OUT/.demo"
for made in world align vdg mined pseudo same heldout cir eval logs index.html metrics.json deltas.png; do
  rm -rf "${OUT:?}/$made"
done
START=$SECONDS

step() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - START)); }

step "draw the world"
python demo/world.py --out $W --seed $SEED

step "1 align: the projection learns to describe pictures"
python vdg_align.py --vision $M/instructblip --llm $M/llama --chat $W/chat/chat.json --images $W/chat/images \
  --keep true --epochs 12 --batch 24 --lr 5e-3 --out $OUT/align --seed $SEED

step "2 tune: the language model learns visual deltas from the human triplets"
LINEARS=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
python vdg_tune.py --aligned $OUT/align --dataset cirr --root $W/cirr --split train --held_out 0 --out $OUT/vdg \
  --epochs 12 --decay_at 0.7 --batch 16 --lr 3e-3 --warmup 20 --lora_rank 16 --lora_targets $LINEARS --views 2 --seed $SEED

step "3 mine pairs from the unlabelled pictures"
python mine_pairs.py --images $W/aux --encoder $M/resnet --exclude $W/cirr/img_raw --max_shared 3 --out $OUT/mined --seed $SEED

step "4 generate deltas: for mined pairs, for the human pairs again, and for held-out pairs to judge"
python gen_deltas.py --vdg $OUT/vdg --pairs $OUT/mined/pairs.jsonl --images $W/aux --subgroups 350 --out $OUT/pseudo --seed $SEED &
AUX_JOB=$!
trap 'kill $AUX_JOB 2>/dev/null' EXIT
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/train --root $W/cirr --out $OUT/same --seed $SEED
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/val --root $W/cirr --max_pairs 500 --out $OUT/heldout --seed $SEED
wait $AUX_JOB
trap - EXIT

step "5 train and 6 evaluate: two models, four training sets, ${JOBS:-2} jobs at a time"
COMBINER="--steps 80 --lr 5e-4 --val_every 5" BLIP_TDM="--steps 140 --lr 1e-3 --val_every 20"
source demo/rows.sh

step "the table"
python demo/report.py --out $OUT --world $W
step "done"
