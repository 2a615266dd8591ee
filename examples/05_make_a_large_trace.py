"""Grow a recorded trace to the shape of a large model, to try commands on before your own recording is there.

python examples/05_make_a_large_trace.py t.trace large.npz [TOKENS]     # 58 MoE layers, 256 experts, top-8

Skew of loads, affinity between layers and co-activation are those of the recorded trace; the file is the interchange
that `moeplace import --from npz` reads.
"""

import sys

import numpy as np

from moeplace.profiling.synthetic.traces import like
from moeplace.profiling.traces.file import load_trace

source, target = sys.argv[1:3]
tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 8192
trace = like(load_trace(source), num_layers=58, num_experts=256, top_k=8, num_tokens=tokens, seed=0)
np.savez(target, experts=trace.topk_ids.astype(np.int16), sequence_ids=trace.sequence_ids)
print(
    f"{target}: {trace.num_tokens} tokens x {trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
)
