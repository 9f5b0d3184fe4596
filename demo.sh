#!/usr/bin/env bash
# The whole road on the embedded world: draw, align, tune, mine, generate, train, evaluate, report.
#   ./demo.sh            -> out/demo/{index.html, metrics.json}, the committed default seed
#   ./demo.sh --seed 1   -> out/demo-seed-1: another world, other triplets, other weights, other samples
# Every line below is a stage with its public flags; copy one to play with it. Sizes are flags, nothing else is special.
set -euo pipefail
cd "$(dirname "$0")"
SEED=0
OUT=out/demo
if [ "${1:-}" = "--seed" ] && [ -n "${2:-}" ]; then
  SEED=$2
  [ "$SEED" = 0 ] || OUT=out/demo-seed-$SEED
elif [ $# -gt 0 ]; then
  echo "usage: ./demo.sh [--seed N]" >&2
  exit 1
fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c "import torch, transformers, PIL, tqdm" 2>/dev/null || python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
M=demo/models W=$OUT/world
rm -rf "$OUT"
START=$SECONDS

step() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - START)); }

step "draw the world"
python demo/world.py --out $W --seed $SEED

step "1 align: the projection learns to describe pictures"
python vdg_align.py --vision $M/instructblip --llm $M/llama --chat $W/chat/chat.json --images $W/chat/images --out $OUT/align \
  --epochs 6 --batch 64 --lr 5e-3 --seed $SEED

step "2 tune: $M/llama learns visual deltas from the human triplets"
python vdg_tune.py --aligned $OUT/align --dataset cirr --root $W/cirr --split train --out $OUT/vdg \
  --epochs 10 --batch 16 --lr 1e-3 --lora_rank 16 --warmup 20 --views 4 --seed $SEED

step "3 mine pairs from the unlabelled pictures"
python mine_pairs.py --images $W/aux --encoder $M/resnet --out $OUT/mined --exclude $W/cirr/img_raw --max_shared 3 --seed $SEED

step "4 generate deltas: auxiliary pairs, the human pairs again, and held-out pairs to judge"
python gen_deltas.py --vdg $OUT/vdg --pairs $OUT/mined/pairs.jsonl --images $W/aux --out $OUT/pseudo --subgroups 400 --seed $SEED
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/train --root $W/cirr --out $OUT/same --seed $SEED
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/val --root $W/cirr --out $OUT/heldout --seed $SEED

step "5 train and 6 evaluate, four ways, two models"
COMMON="--dataset cirr --root $W/cirr --split train --val_split dev --val_every 25 --steps 200 --lr 1e-3 --tau 0.05 --views 4 --seed $SEED"
AUX="--pseudo $OUT/pseudo/pseudo.jsonl --pseudo_images $W/aux"
SAME="--same_pairs $OUT/same/pseudo.jsonl"
one_model() { # model, backbone: the four rows of the table
  local model=$1 backbone=$2 row
  for row in supervised same auxiliary only; do
    case $row in
      supervised) extra="" ;;
      same) extra="$SAME" ;;
      auxiliary) extra="$SAME $AUX" ;;
      only) extra="--triplets false $AUX" ;;
    esac
    python train_cir.py --model $model --backbone $backbone $COMMON $extra --out $OUT/cir/$model-$row
    python eval_cir.py --checkpoint $OUT/cir/$model-$row --dataset cirr --root $W/cirr --split val --official false \
      --out $OUT/eval/$model-$row
  done
}
# The two models share the machine: one CPU thread each is faster than two threads one after the other.
export OMP_NUM_THREADS=1
one_model combiner $M/clip > $OUT/combiner.log 2>&1 &
CLIP_JOB=$!
one_model blip_tdm $M/blip || { kill $CLIP_JOB; exit 1; }
wait $CLIP_JOB || { tail -5 $OUT/combiner.log; exit 1; }

step "the table"
python demo/report.py --out $OUT --world $W
step "done"
