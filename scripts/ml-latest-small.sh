#!/usr/bin/env bash
# MovieLens ml-latest-small from raw ratings to a tuned ranker and its table:
#   scripts/ml-latest-small.sh RAW_DIR OUTPUT_DIR [options of alro_fast.train]
exec bash "$(dirname "$0")/movielens.sh" ml-latest-small "$@"
