#!/usr/bin/env bash
# GPU tests, then benchmarks, from a checkout that is not installed: bench/device.sh OUTPUT_FOLDER
#
# Needs python with torch, triton, pytest and pytest-benchmark; no network, no build. Ends within nine minutes: each part
# has a time limit, and a part that fails or runs out of time does not stop the next. Leaves in OUTPUT_FOLDER: *.json
# (results), *.log, *.xml (tests), report.md, *.png (with matplotlib) and summary.txt. Status 1 when a part failed.
set -uo pipefail
output=$(mkdir -p "${1:?usage: bench/device.sh OUTPUT_FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore TRITON_CACHE_DIR="$output/.triton"
unset TRITON_INTERPRET
status=0
: >"$output/summary.txt"

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS result=ok
  shift 2
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$output/$name.log" 2>&1 || { result="failed ($?)"; status=1; }
  echo "$name: $result, $((SECONDS - began)) s; $(tail -n 1 "$output/$name.log")" | tee -a "$output/summary.txt"
}

bench() { # bench NAME SECONDS FILE [pytest's options]
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" python -m pytest "$@" -q -p no:cacheprovider --benchmark-json "$output/$name.json" \
    --benchmark-disable-gc
}

nvidia-smi >"$output/device.log" 2>&1
python -c "import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)" | tee -a "$output/summary.txt"
mapfile -t tests < <(grep -lr "mark.gpu" tests --include "test_*.py")
part tests 130 python -m pytest "${tests[@]}" -q -m gpu -p no:cacheprovider --continue-on-collection-errors \
  --junitxml "$output/tests.xml"
bench listwise 60 bench/bench_listwise.py
BENCH_QUICK=1 bench head 150 bench/bench_head.py
if python -c "import transformers, peft" 2>>"$output/device.log"; then
  for shape in 0.5B 8B; do # each in a process of its own: one that runs out of time or memory takes no other along
    BENCH_QUICK=1 bench "step-$shape" 70 bench/bench_step.py -k "$shape"
  done
else
  echo "step: not run, transformers and peft are not installed" | tee -a "$output/summary.txt"
fi
shopt -s nullglob
results=("$output"/*.json)
if [ "${#results[@]}" -gt 0 ]; then
  part report 30 python -m bench.report "${results[@]}" --output "$output"
fi
rm -rf "$output/.triton"
exit "$status"
