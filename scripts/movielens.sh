#!/usr/bin/env bash
# A MovieLens edition, or a folder in the format of one, from raw ratings to a tuned ranker and its table,
# OUTPUT_DIR/run/results.json:
#   scripts/movielens.sh DATASET RAW_DIR OUTPUT_DIR [options of alro_fast.train, such as --seed 1]
# DATASET: ml-100k, ml-1m, ml-latest-small, ... as alro_fast.prepare names them. SIGNALS=average,count,hint leaves out
# `near`, which compares items by a table of items x users.
set -euo pipefail
dataset=$1 raw=$2 out=$3
shift 3
python -m alro_fast.prepare --dataset "$dataset" --raw_dir "$raw" --allow_altered --output_dir "$out/lists" \
  --signals "${SIGNALS:-average,count,hint,near}"
python -m alro_fast.train --config movielens --data_dir "$out/lists" --output_dir "$out/run" "$@"
