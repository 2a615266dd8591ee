#!/usr/bin/env bash
# Place the experts of a model for a Ray cluster, and serve it there: two jobs, one after the other.
#
#   launch/scripts/ray_job.sh MODEL TRACE FOLDER
#
#   MODEL, TRACE, FOLDER   paths that every node of the cluster can read (FOLDER: write)
#
# FOLDER gets placement.json. The service answers on PORT of the head until the job is stopped (`ray job stop`), and
# takes its bearer token from FOLDER/api-key, which must be there.
#
# Environment: RAY_ADDRESS (http://127.0.0.1:8265), RANKS (4), GPUS_PER_RANK (0), PORT (8000), TIME_LIMIT of the solver
# in seconds (60), PYTHON (python), CLUSTER_PYTHON: the interpreter on the cluster (python).
set -euo pipefail

if (($# != 3)); then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
model=$1 trace=$2 folder=$3
address=${RAY_ADDRESS:-http://127.0.0.1:8265}
ranks=${RANKS:-4}
python=${PYTHON:-python}
cluster_python=${CLUSTER_PYTHON:-python}

# 1. Solve, on the head. The package travels with the job; its libraries must be installed on the cluster.
"$python" -m moeplace.launch.cli ray submit --address "$address" --python "$cluster_python" -- \
    solve "$trace" --ranks "$ranks" --mode auto --time-limit "${TIME_LIMIT:-60}" --out "$folder/placement.json"

# 2. Serve: a driver on the head, one actor per rank, each in a placement group of its own. A rank that is lost is
#    replaced where it was. More or fewer ranks: POST /admin/scale {"ranks": N} with the token.
exec "$python" -m moeplace.launch.cli ray submit --address "$address" --python "$cluster_python" --no-wait -- \
    ray serve "$model" --http "0.0.0.0:${PORT:-8000}" --admin --api-key-file "$folder/api-key" \
    --ranks "$ranks" --gpus-per-rank "${GPUS_PER_RANK:-0}" --placement "$folder/placement.json"
