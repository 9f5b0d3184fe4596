# Step 5 and 6 of demo.sh and demo/photos.sh, which source this: two models on four training sets, JOBS at a time, each
# trained by train_cir.py and measured by eval_cir.py. COMBINER and BLIP_TDM hold the flags of one demo alone; OUT, M, W
# and SEED are its folders and seed. What was measured before is not done again.
one_row() { # model and row of the table
  local model=${1%-*} row=${1#*-} data how
  [ ! -f $OUT/eval/$1/metrics.json ] || return 0
  case $model in
    combiner) how="--backbone $M/clip $COMBINER" ;;
    blip_tdm) how="--backbone $M/blip $BLIP_TDM" ;;
  esac
  case $row in
    supervised) data="" ;;
    same) data="--same_pairs $OUT/same/pseudo.jsonl" ;;
    auxiliary) data="--same_pairs $OUT/same/pseudo.jsonl --pseudo $OUT/pseudo/pseudo.jsonl --pseudo_images $W/aux" ;;
    only) data="--triplets false --pseudo $OUT/pseudo/pseudo.jsonl --pseudo_images $W/aux" ;;
  esac
  python train_cir.py --model $model $how $data --dataset cirr --root $W/cirr --split train --batch 48 --tau 0.05 --views 2 \
    --val_split dev --out $OUT/cir/$1 --seed $SEED &&
  python eval_cir.py --checkpoint $OUT/cir/$1 --dataset cirr --root $W/cirr --split val --official false --out $OUT/eval/$1
}
export -f one_row
export SEED OUT M W COMBINER BLIP_TDM OMP_NUM_THREADS=1
mkdir -p $OUT/logs
printf '%s\n' blip_tdm-auxiliary blip_tdm-only blip_tdm-same blip_tdm-supervised \
              combiner-auxiliary combiner-only combiner-same combiner-supervised |
  xargs -P "${JOBS:-2}" -I{} bash -c 'one_row {} > $OUT/logs/{}.log 2>&1 || { tail -3 $OUT/logs/{}.log; exit 255; }
                           echo "{}: $(grep -c . $OUT/cir/{}/log.jsonl) log lines, $OUT/eval/{}/index.html"'
