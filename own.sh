#!/usr/bin/env bash
# From a folder of pictures to the page, in one command: mine pairs, describe them, index, serve. Killed, it goes on.
#   ./own.sh my_pictures                                       the embedded models: photographs of single products
#   CHECKPOINT=out/cir VDG=out/vdg ENCODER=microsoft/resnet-152 ./own.sh my_pictures --port 8001
# Flags behind the folder go to search.py. PAIRS=2000: so many pairs are described at most; 0 = all.
set -euo pipefail
if [ $# -eq 0 ] || [ ! -d "$1" ]; then
  echo "usage: ./own.sh FOLDER [flags of search.py]" >&2
  exit 1
fi
FOLDER=$(realpath "$1")
shift
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements-search.txt
export TOKENIZERS_PARALLELISM=false
OUT=out/own/$(basename "$FOLDER")
ENCODER=${ENCODER:-demo/models_photos/resnet}
if [ -z "${VDG:-}" ]; then
  for VDG in out/vdg out/demo/vdg ""; do
    [ ! -e "$VDG/config.json" ] || break
  done
fi
PAIRS=${PAIRS:-2000}
LABEL=()
trap "exit 130" INT  # else Ctrl-C would end one step only
mkdir -p "$OUT"

# A step that fails (too few pictures, a file that cannot be read) says so in a line; the page comes all the same.
if [ -z "$VDG" ]; then
  echo "1, 2 no pairs to label: no VDG in out/vdg or out/demo/vdg, and none named by VDG=..."
else
  echo "1 mine: pairs of similar pictures, by $ENCODER"
  if python mine_pairs.py --images "$FOLDER" --encoder "$ENCODER" --out "$OUT/mined" > "$OUT/mine.txt" &&
    echo "2 describe: what turns the one into the other, by $VDG" &&
    python gen_deltas.py --vdg "$VDG" --pairs "$OUT/mined/pairs.jsonl" --images "$FOLDER" --max_pairs "$PAIRS" \
      --out "$OUT/pseudo" > "$OUT/describe.txt"; then
    LABEL=(--label "$OUT/pseudo/pseudo.jsonl")
  fi
fi
echo "3, 4 index and serve"
exec python search.py --gallery "$FOLDER" --checkpoint "${CHECKPOINT:-}" --out "$OUT/search" "${LABEL[@]}" "$@"
