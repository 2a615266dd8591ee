#!/usr/bin/env bash
# Serve a file of requests on the ranks of several nodes, under a placement made for them. Run it on every node, with
# the same arguments on all of them and NODE = 0, 1, ...
#
#   NODE=0 NODES=2 HEAD=10.0.0.1 launch/scripts/multinode.sh MODEL PLACEMENT REQUESTS FOLDER     # on 10.0.0.1
#   NODE=1 NODES=2 HEAD=10.0.0.1 launch/scripts/multinode.sh MODEL PLACEMENT REQUESTS FOLDER     # on the other one
#
# The placement must be for NODES x RANKS_PER_NODE ranks:
#
#   moeplace solve TRACE --ranks 16 --ranks-per-node 8 --mode auto --out PLACEMENT
#
# MODEL and PLACEMENT must be readable on every node, REQUESTS and FOLDER are used on node 0 alone.
#
# Environment: NODE, NODES, HEAD (address of node 0); RANKS_PER_NODE (8), PORT on the head (29500), PYTHON (python).
# Where a node has several networks, name the fast one: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.
set -euo pipefail

if (($# != 4)) || [[ -z ${NODE:-} || -z ${NODES:-} || -z ${HEAD:-} ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
model=$1 placement=$2 requests=$3 folder=$4
python=${PYTHON:-python}

if ((NODE == 0)); then
    mkdir -p "$folder"
fi

# A fixed world: if a rank dies, all end. (A service that goes on without it: `moeplace serve --http`, or Ray.)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE" \
    --nproc-per-node "${RANKS_PER_NODE:-8}" --master-addr "$HEAD" --master-port "${PORT:-29500}" --max-restarts 0 \
    -m moeplace.launch.cli serve "$model" --placement "$placement" --node-aware \
    --requests "$requests" --out "$folder/completions.jsonl" --json "$folder/figures.json"
