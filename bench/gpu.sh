#!/usr/bin/env bash
# Every CUDA check, then every GPU row of bench/results.csv, within ten minutes. Without a GPU: says so and stops.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -f .venv/bin/activate ] || source .venv/bin/activate
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "bench/gpu.sh: no GPU here, nothing checked and nothing measured"
  exit 0
fi
python -m pytest -x tests/triton_kernels.py
python bench/mining.py --device cuda --check 1
for bench in loss mining reversed generation tuning; do
  [ ! -f "bench/$bench.py" ] || python "bench/$bench.py" --device cuda
done
