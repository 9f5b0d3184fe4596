#!/usr/bin/env bash
# From a folder of pictures to the page, in one command: mine pairs, describe them, index, serve. Killed, it goes on.
#   ./own.sh my_pictures                                       the embedded models: photographs of single products
#   CHECKPOINT=out/cir VDG=out/vdg ENCODER=microsoft/resnet-152 ./own.sh my_pictures --port 8001
# Flags behind the folder go to search.py. PAIRS=2000: so many pairs are described at most; 0 = all.
# It writes out/own/NAME-HASH; HASH stands for the folder's path, so that two folders of one name share nothing.
set -euo pipefail
if [ $# -eq 0 ] || [ ! -d "$1" ]; then
  echo "usage: ./own.sh FOLDER [flags of search.py]" >&2
  exit 1
fi
FOLDER=$(realpath "$1")
shift
HERE=$(dirname "$(realpath "$0")")  # no cd: the paths that were given hold where they were given
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x "$HERE/.venv/bin/python" ] || python3 -m venv "$HERE/.venv"
  source "$HERE/.venv/bin/activate"
fi
python -m pip install --quiet --disable-pip-version-check -r "$HERE/requirements-search.txt"
export TOKENIZERS_PARALLELISM=false
digest() { sha256sum | cut -c 1-8; }
OUT=$HERE/out/own/$(basename "$FOLDER")-$(printf %s "$FOLDER" | digest)
MINED=$OUT/mined
if [ -n "${ENCODER:-}" ]; then  # what another encoder mined has a folder of its own
  [ ! -d "$ENCODER" ] || ENCODER=$(realpath "$ENCODER")
  MINED+=-$(printf %s "$ENCODER" | digest)
fi
ENCODER=${ENCODER:-$HERE/demo/models_photos/resnet}
VDG=${VDG:-$HERE/out/vdg}  # never out/demo/vdg, which knows the drawn world only
PAIRS=${PAIRS:-2000}
LABEL=()
OLD=$HERE/out/own/$(basename "$FOLDER")
[ ! -d "$OLD" ] || echo "$OLD is of an earlier version: rename it to $OUT to keep its labels"
mkdir -p "$OUT"
echo "writes $OUT"

# A signal ends the step that runs, and then this script. In the foreground a step would not get TERM; in the background
# it would ignore Ctrl-C, but for the inner trap.
CHILD=
step() {
  (trap - INT; exec python "$@") &
  CHILD=$!
  wait "$CHILD"
}
trap 'wait; exit 130' INT
trap '[ -z "$CHILD" ] || kill "$CHILD" 2> /dev/null || true; wait; exit 143' TERM HUP

# What would stop the page (a wrong flag, a port or a folder in use) is found before the hours of mining and describing.
SEARCH=("$HERE/search.py" --gallery "$FOLDER" --checkpoint "${CHECKPOINT:-}" --out "$OUT/search")
step "${SEARCH[@]}" --check true "$@" > /dev/null

# A step that fails (a full disk, a file that cannot be read) says so in a line; the page comes all the same.
if [ "$VDG" = "$HERE/out/vdg" ] && [ ! -e "$VDG/config.json" ]; then
  echo "1, 2 no pairs to label: no VDG in out/vdg and none named by VDG=..."
else
  # the texts of another VDG get a folder of their own
  FILES=("$VDG"/{config,adapter_config}.json "$VDG"/{adapter_model,projection}.safetensors)
  PSEUDO=$OUT/pseudo-$(cat "${FILES[@]}" 2> /dev/null | digest || true)
  echo "1 mine: pairs of similar pictures, by $ENCODER"
  if step "$HERE/mine_pairs.py" --images "$FOLDER" --encoder "$ENCODER" --out "$MINED" > "$OUT/mine.txt"; then
    if [ -s "$MINED/pairs.jsonl" ]; then
      echo "2 describe: what turns the one into the other, by $VDG"
      step "$HERE/gen_deltas.py" --vdg "$VDG" --pairs "$MINED/pairs.jsonl" --images "$FOLDER" \
        --max_pairs "$PAIRS" --out "$PSEUDO" > "$OUT/describe.txt" || true
    else
      echo "2 no pairs to label: too few similar pictures; $OUT/mine.txt says more"
    fi
  fi
  [ ! -e "$PSEUDO/pseudo.jsonl" ] || LABEL=(--label "$PSEUDO/pseudo.jsonl")
fi
echo "3, 4 index and serve"
exec python "${SEARCH[@]}" "${LABEL[@]}" "$@"
