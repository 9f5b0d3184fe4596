#!/usr/bin/env bash
# The whole road on product photographs with a pretrained language model: ./demo.sh --world photos runs this.
#   ./demo.sh --world photos --data FOLDER                -> out/demo-photos/{index.html, metrics.json}
#   ./demo.sh --world photos --data FOLDER --llm smollm2  another place than out/smollm2
#   ./demo.sh --world photos --data FOLDER --seed 1       -> out/demo-photos-seed-1: other photographs, triplets, weights
# FOLDER holds "Fashion Product Images (Small)" (demo/products.py); bench/real_llm.py makes the language model's folder.
# An hour and a half on one core beside other work (docs/photos.md). Stopped or killed, the same command goes on: what a part has written, it does not do again.
# Every line below is a stage with its public flags; the sizes in capitals may be set in the environment (CHAT=200 ...).
set -euo pipefail
SEED=0 DATA="" LLM=""
while [ $# -gt 0 ]; do
  case "$1${2:+ value}" in
    "--data value") DATA=$2 ;;
    "--llm value") LLM=$2 ;;
    "--seed value") SEED=$2 ;;
    *) echo "usage: ./demo.sh --world photos --data FOLDER [--llm FOLDER] [--seed N]" >&2; exit 1 ;;
  esac
  shift 2
done
if [ ! -e "$DATA/styles.csv" ] && [ ! -e "$DATA/products.jsonl" ]; then
  echo "error: --data '$DATA': wanted the folder of the catalogue, styles.csv + images/ or products.jsonl + photos.zip" >&2
  exit 1
fi
DATA=$(realpath "$DATA")
[ -z "$LLM" ] || LLM=$(realpath -m "$LLM")
cd "$(dirname "$0")/.."
LLM=${LLM:-$PWD/out/smollm2}
if [ ! -e "$LLM/config.json" ]; then
  echo "error: --llm $LLM: no language model there; bench/real_llm.py says how to make one, and in two commands" >&2
  exit 1
fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
OUT=out/demo-photos
[ "$SEED" = 0 ] || OUT=out/demo-photos-seed-$SEED
M=${MODELS:-demo/models_photos} W=$OUT/world
START=$SECONDS

# ---- sizes ----
CHAT=${CHAT:-6000}               # captioned photographs to align with, ...
ENTRIES=${ENTRIES:-0.5}          # ... share of their captions that are the catalogue's entry, not the shop's title, ...
ALIGN_EPOCHS=${ALIGN_EPOCHS:-3}  # ... and passes over them
TRAIN=${TRAIN:-300}              # human-like triplets, ...
TUNE_EPOCHS=${TUNE_EPOCHS:-8}    # ... and passes over them
AUX=${AUX:-3000}                 # unlabelled photographs
SUBGROUPS=${SUBGROUPS:-300}      # mined subgroups that are described, nine pairs each
HELD_OUT=${HELD_OUT:-500}        # held-out pairs whose deltas are judged
DEV_GROUPS=${DEV_GROUPS:-60}     # sets of six of dev, four queries each
VAL_GROUPS=${VAL_GROUPS:-250}    # ... and of val
STEPS=${STEPS:-160}              # of each retrieval model
# of the language model: 16 bits where the processor computes with them, as GPUs do by themselves
DTYPE=${DTYPE:-$(grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo auto)}

step() { printf '\n== %s (%d s) ==\n' "$1" $((SECONDS - START)); }

step "photographs: the catalogue laid out as benchmarks"
[ -f $W/attributes.json ] || python demo/catalogue.py --data "$DATA" --out $W --seed $SEED --chat $CHAT --entries $ENTRIES \
  --train $TRAIN --aux $AUX --dev_groups $DEV_GROUPS --val_groups $VAL_GROUPS

step "1 align: the projection learns to say titles and entries"
python vdg_align.py --vision $M/instructblip --llm "$LLM" --chat $W/chat/chat.json --images $W/chat/images \
  --keep true --epochs $ALIGN_EPOCHS --batch 8 --lr 2e-3 --dtype $DTYPE --out $OUT/align --seed $SEED

step "2 tune: the language model learns visual deltas from the human-like triplets"
python vdg_tune.py --aligned $OUT/align --dataset cirr --root $W/cirr --split train --held_out 0 --out $OUT/vdg \
  --epochs $TUNE_EPOCHS --decay_at 0.7 --batch 8 --lr 1e-3 --warmup 20 --lora_rank 16 --views 2 --dtype $DTYPE --seed $SEED

step "3 mine pairs from the unlabelled photographs"
[ -f $OUT/mined/pairs.jsonl ] || python mine_pairs.py --images $W/aux --encoder $M/resnet --exclude $W/cirr/img_raw \
  --max_shared 3 --out $OUT/mined --seed $SEED

step "4 generate deltas: for held-out pairs to judge, for the human-like pairs again, and for mined pairs"
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/val --root $W/cirr --max_pairs $HELD_OUT --max_new 20 --dtype $DTYPE \
  --out $OUT/heldout --seed $SEED
python gen_deltas.py --vdg $OUT/vdg --triplets cirr/train --root $W/cirr --max_new 20 --dtype $DTYPE --out $OUT/same --seed $SEED
python gen_deltas.py --vdg $OUT/vdg --pairs $OUT/mined/pairs.jsonl --images $W/aux --subgroups $SUBGROUPS --max_new 20 \
  --dtype $DTYPE --out $OUT/pseudo --seed $SEED

step "5 train and 6 evaluate: two models, four training sets, ${JOBS:-2} jobs at a time"
COMBINER="--steps $STEPS --lr 5e-4 --val_every 10" BLIP_TDM="--steps $STEPS --lr 1e-3 --val_every 20"
source demo/rows.sh

step "the table"
python demo/report.py --kind photos --out $OUT --world $W
step "done"
