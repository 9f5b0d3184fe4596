#!/usr/bin/env bash
# Installs what the tests need and runs them (CPU only, no network beyond pip). Arguments go to pytest.
# REQUIREMENTS=requirements-older.txt takes older versions of torch, triton and transformers, best in a venv of its own.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r "${REQUIREMENTS:-requirements-dev.txt}"
python -m ruff check .
exec python -m pytest "$@"
