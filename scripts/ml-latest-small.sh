#!/usr/bin/env bash
# MovieLens ml-latest-small from raw ratings to a tuned ranker and its table:
#   scripts/ml-latest-small.sh RAW_DIR OUTPUT_DIR [options of alro_fast.train]
# LIMIT=N evaluates the first N test lists only.
set -euo pipefail
raw=$1 out=$2
shift 2
python -m alro_fast.prepare --dataset ml-latest-small --raw_dir "$raw" --output_dir "$out/lists" --train_stride 5
python -m alro_fast.train --config ml-latest-small --data_dir "$out/lists" --output_dir "$out/run" "$@"
python -m alro_fast.evaluate --adapter "$out/run" --lists "$out/lists" --shuffles 3 --output_dir "$out/evaluation" \
  ${LIMIT:+--limit "$LIMIT"}
