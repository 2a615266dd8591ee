#!/usr/bin/env bash
# A new user's first hour: from a clone to a placement file for each engine, all in one folder.
#
#   make quickstart && . .venv/bin/activate       # or: pip install '.[runtime]'
#   examples/first_hour.sh [FOLDER]               # default: first-hour
#
# Read it, or copy single lines: each command stands for itself. The shipped model stands for yours in the first part, a
# synthetic trace of DeepSeek-V3's shape for a recording of a large one in the second. Limits are short: give `solve`
# minutes for a placement that you mean to run.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MODEL=$REPO/launch/data/tiny-moe
TEXT=$REPO/launch/data/text
mkdir -p "${1:-first-hour}" && cd "${1:-first-hour}"

# 1. The whole loop at once: on 4 local ranks, index order and solved, logits checked. Open quickstart/report.html.
moeplace quickstart --out quickstart

# 2. The same by hand. Profile what you will serve, and look whether placement can gain anything.
moeplace profile $MODEL --text $TEXT/kjv.txt $TEXT/python-docs.txt --max-tokens 16384 --out t.trace
moeplace stats t.trace --ranks 8

# 3. A placement for 8 ranks with a proven bound, the mode to run it in, and what it costs on held-out sequences.
moeplace solve t.trace --ranks 8 --mode auto --time-limit 10 --out p.json
moeplace evaluate t.trace p.json
moeplace verify p.json --trace t.trace
moeplace compare t.trace --ranks 8 --solvers index-order,lpt,auto --time-limit 5
moeplace report t.trace --placement p.json --out r.html

# 4. Serve it here, on one rank: one request a line in, one completion a line out.
echo '{"prompt": "In the beginning"}' > in.jsonl
moeplace serve $MODEL --requests in.jsonl --max-new-tokens 8 --out out.jsonl

# 5. A large model: 58 MoE layers of 256 experts after 3 dense ones, top-8, on 4 nodes of 8 GPUs, one spare slot each.
python $REPO/examples/05_make_a_large_trace.py t.trace large.npz
moeplace import large.npz --from npz --num-experts 256 --layer-ids 3-60 --num-hidden-layers 61 \
    --model deepseek-v3 --hidden-size 7168 --expert-bytes 44040192 --out v3.trace
moeplace stats v3.trace --no-locality
moeplace solve v3.trace --ranks 32 --ranks-per-node 8 --slots-per-rank 9 --max-imbalance 1.05 \
    --batch 4096 --time-limit 60 --seed 0 --out v3-placement.json
moeplace evaluate v3.trace v3-placement.json --batch 4096
moeplace report v3.trace --placement v3-placement.json --out v3.html

# 6. The file for your engine; each command prints the flags that the engine needs.
moeplace export v3-placement.json --to sglang --out v3-sglang.json
moeplace export v3-placement.json --to vllm --out v3-vllm.json
moeplace export v3-placement.json --to trtllm --out v3-trtllm.yaml
moeplace export v3-placement.json --to vllm-ascend --out v3-ascend.json
moeplace export v3-placement.json --to omni --out v3-omni.npy

# 7. The way back: what an engine's file says is the placement that was solved.
moeplace import-placement v3-sglang.json --from sglang --out back.json
moeplace evaluate v3.trace back.json --batch 4096

# 8. Later, with fewer moves than a new placement takes: what to move, in which order.
moeplace solve v3.trace --ranks 32 --ranks-per-node 8 --slots-per-rank 9 --batch 4096 --time-limit 20 \
    --previous v3-placement.json --max-moves 16 --out v3-next.json
moeplace plan v3-placement.json v3-next.json --expert-bytes 44040192 --out plan.json
