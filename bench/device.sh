#!/usr/bin/env bash
# GPU tests, then benchmarks, from a checkout that is not installed: bench/device.sh OUTPUT_FOLDER [--dry] [PART ...]
#
# Needs python with torch, triton, pytest and pytest-benchmark; no network, no build. All parts, or those named; each has
# a time limit, one that fails or runs out of time does not stop the next, and the limits end a run within ten minutes.
# Leaves in OUTPUT_FOLDER: *.json (results: device, versions, medians, spread), *.log, *.xml (tests), report.md, *.png
# (with matplotlib) and summary.txt; those of a GPU are kept in bench/results/<device>/. Status 1 when a part failed.
#   --dry   the same on the CPU: kernels interpreted, shapes tiny. It proves this script and what it calls, and measures
#           nothing. Tests of a GPU are named in tests.log as skipped; some that interpret the same kernels stand in.
#   --list  prints the parts with their limits in seconds, and runs none.
set -uo pipefail
output="" dry=0 list=0 chosen=" "
for argument in "$@"; do
  case $argument in
    --dry) dry=1 ;;
    --list) list=1 ;;
    -*) echo "error: $argument is no option; expected --dry or --list" >&2; exit 2 ;;
    *) if [ -z "$output" ]; then output=$argument; else chosen+="$argument "; fi ;;
  esac
done
here="$(cd "$(dirname "$0")/.." && pwd)"
known=" tests interpreted listwise head attention rates step-0.5B step-8B step-tiny report "
for name in $chosen; do
  [[ $known == *" $name "* ]] || { echo "error: $name is no part; expected some of$known" >&2; exit 2; }
done
if [ "$list" = 0 ]; then
  output=$(mkdir -p "${output:?usage: bench/device.sh OUTPUT_FOLDER [--dry] [PART ...]}" && cd "$output" && pwd) || exit 2
  : >"$output/summary.txt"
fi
cd "$here" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore BENCH_QUICK=1 TRITON_CACHE_DIR="$output/.triton"
unset TRITON_INTERPRET BENCH_DRY
if [ "$dry" = 1 ]; then export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1 BENCH_DRY=1; fi
status=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS result=ok
  shift 2
  [[ $chosen == " " || $chosen == *" $name "* ]] || return 0
  if [ "$dry" = 1 ]; then limit=$((4 * limit)); fi # a busy laptop's; without a GPU nothing is paid for by the minute
  if [ "$list" = 1 ]; then echo "$name $limit"; return 0; fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$output/$name.log" 2>&1 || { result="failed ($?)"; status=1; }
  echo "$name: $result, $((SECONDS - began)) s; $(tail -n 1 "$output/$name.log")" | tee -a "$output/summary.txt"
}

tests() { # tests NAME SECONDS [pytest's options]
  part "$1" "$2" python -m pytest "${@:3}" -v -p no:cacheprovider --continue-on-collection-errors \
    --junitxml "$output/$1.xml"
}

bench() { # bench NAME SECONDS FILE [pytest's options]
  part "$1" "$2" python -m pytest "${@:3}" -q -p no:cacheprovider --benchmark-json "$output/$1.json" \
    --benchmark-disable-gc
}

report() { # one file that cannot be read takes no other along: an interrupted part may have left half of one
  shopt -s nullglob
  local made=("$output"/*.json)
  if [ "${#made[@]}" = 0 ]; then echo "no results"; return 1; fi
  python -m bench.report "${made[@]}" --output "$output" --skip-unreadable
}
export -f report
export output

if [ "$list" = 0 ]; then
  nvidia-smi >"$output/device.log" 2>&1
  python -c "import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)" 2>&1 |
    tail -n 1 | tee -a "$output/summary.txt"
fi
mapfile -t marked < <(grep -lr "mark.gpu" tests --include "test_*.py")
tests tests 140 "${marked[@]}" -m gpu
if [ "$dry" = 1 ]; then tests interpreted 60 tests/kernels/test_kernels_{gather,row_kernel}.py -k "not segments"; fi
bench listwise 30 bench/bench_listwise.py
bench head 105 bench/bench_head.py
bench attention 40 bench/bench_attention.py
part rates 20 python -m bench.bench_attention # a line of alro_fast.kernels.attention_costs.RATES, in summary.txt
shapes=(0.5B 8B)
if [ "$dry" = 1 ]; then shapes=(tiny); fi
for shape in "${shapes[@]}"; do # each in a process of its own: one that runs out of time or memory takes no other along
  bench "step-$shape" 70 bench/bench_step.py -k "$shape"
done
part report 30 bash -c report
if [ "$list" = 0 ]; then rm -rf "$output/.triton"; fi
exit "$status"
