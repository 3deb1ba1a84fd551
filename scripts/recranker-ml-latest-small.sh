#!/usr/bin/env bash
# RecRanker on MovieLens ml-latest-small, from raw ratings to the hybrid of three tasks and its table:
#   scripts/recranker-ml-latest-small.sh RAW_DIR OUTPUT_DIR [options of alro_fast.train]
# The last table compares every pair of candidates; that of training one random partner each.
# SAMPLES=N draws N users for training lists (default 2500); LIMIT=N evaluates the first N test lists only.
set -euo pipefail
raw=$1 out=$2
shift 2
python -m alro_fast.first_stage --dataset ml-latest-small --raw_dir "$raw" --retriever als \
  --num_samples "${SAMPLES:-2500}" --output_dir "$out/lists"
python -m alro_fast.train --config recranker --data_dir "$out/lists" --output_dir "$out/run" "$@"
python -m alro_fast.evaluate --adapter "$out/run" --lists "$out/lists" --pairing all \
  --output_dir "$out/evaluation" ${LIMIT:+--limit "$LIMIT"}
