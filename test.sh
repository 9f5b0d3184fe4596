#!/usr/bin/env bash
# Installs what the tests need and runs them (CPU only, no network beyond pip): two halves side by side, a thread each.
# Arguments go to pytest, which then runs alone.
# REQUIREMENTS=requirements-older.txt takes older versions of torch, triton and transformers, best in a venv of its own.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r "${REQUIREMENTS:-requirements-dev.txt}"
python -m ruff check .
[ $# = 0 ] || exec python -m pytest "$@"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
FIRST=$(mktemp)
trap 'rm -f "$FIRST"' EXIT
python -m pytest tests/faults tests/test_[a-m]*.py > "$FIRST" 2>&1 &
HALF=$! STATUS=0
python -m pytest tests/test_[n-z]*.py || STATUS=$?
wait $HALF || STATUS=$?
cat "$FIRST"
exit $STATUS
