#!/usr/bin/env bash
# Everything that only a GPU can show, in under twelve minutes; see bench/GPU-CHECKLIST.md.
#
#   bench/gpu_check.sh [DIRECTORY]       results and one log a step; default bench/results
#   PYTHON=python3 bench/gpu_check.sh    another interpreter than .venv/bin/python
#   STRESS_S=600 bench/gpu_check.sh      the full stress; raises the limit by as much
#
# A step that fails does not stop the others. Exit status 1 after any failure.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 STRESS_S="${STRESS_S:-60}"
PYTHON="${PYTHON:-.venv/bin/python}"
OUT="${1:-bench/results}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
rows=()
failed=0

# step NAME LIMIT_S COMMAND...: run it under a limit, keep its output, remember how it went.
step() {
  local name="$1" limit="$2" start=$SECONDS rc
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/gpu-check-$name.log" 2>&1
  rc=$?
  [ "$rc" -eq 0 ] || failed=1
  rows+=("$(printf '%-12s rc %3d  %4d s  %s' "$name" "$rc" $((SECONDS - start)) \
    "$(grep -v '^{' "$OUT/gpu-check-$name.log" | tail -n 1 | cut -c 1-90)")")
}

skip() {
  rows+=("$(printf '%-12s skipped: %s' "$1" "$2")")
}

# The limits add up to twelve minutes; what is compiled once stays compiled on disk.
step machine 30 "$PYTHON" -c 'import json
from microclip_deploy.bench.card import environment
from microclip_deploy.bench.kernel.run import require_cuda
print(json.dumps(environment(), indent=1)); print(require_cuda())'
step variants 60 "$PYTHON" -m microclip_deploy.bench.kernel.sanitize
step pytest 300 "$PYTHON" -m pytest -m gpu -p no:cacheprovider \
  --junitxml="$OUT/gpu-check-pytest.xml"
step kernel 130 "$PYTHON" -m microclip_deploy.cli bench ncut --out "$OUT"
step stress $((STRESS_S + 20)) "$PYTHON" -m microclip_deploy.bench.kernel.stress \
  --out "$OUT/gpu-check-stress.json"
sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"
for tool in memcheck racecheck; do
  if [ -n "$sanitizer" ]; then
    step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 \
      "$PYTHON" -m microclip_deploy.bench.kernel.sanitize
  else
    skip "$tool" "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
  fi
done

echo
printf '%s\n' "${rows[@]}" | tee "$OUT/gpu-check.txt"
exit "$failed"
