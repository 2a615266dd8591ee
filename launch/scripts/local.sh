#!/usr/bin/env bash
# Place the experts of a model on the ranks of this machine, and serve a file of requests under that placement.
#
#   launch/scripts/local.sh MODEL TRACE REQUESTS FOLDER
#
#   MODEL     checkpoint folder
#   TRACE     its routing, recorded (`moeplace profile`) or imported (`moeplace import`)
#   REQUESTS  JSONL, one request a line
#   FOLDER    gets placement.json, completions.jsonl and figures.json
#
# Environment: RANKS (4), TIME_LIMIT of the solver in seconds (10), PYTHON (python).
set -euo pipefail

if (($# != 4)); then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
model=$1 trace=$2 requests=$3 folder=$4
ranks=${RANKS:-4}
python=${PYTHON:-python}

mkdir -p "$folder"

# 1. Which rank holds which expert, and in which mode to run.
"$python" -m moeplace.launch.cli solve "$trace" --ranks "$ranks" --mode auto --time-limit "${TIME_LIMIT:-10}" \
    --out "$folder/placement.json"

# 2. One process per rank, on a port that torchrun finds itself. One thread each: ranks share the cores of a CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    -m moeplace.launch.cli serve "$model" --placement "$folder/placement.json" \
    --requests "$requests" --out "$folder/completions.jsonl" --json "$folder/figures.json"
