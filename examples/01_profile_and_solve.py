"""Profile the shipped model on the shipped texts, place its experts on 4 ranks, and judge that on held-out text.

python examples/01_profile_and_solve.py [FOLDER]      # writes routing.trace and placement.json there
"""

import sys
from pathlib import Path

from moeplace.launch.quickstart.run import shipped, shipped_texts
from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import index_order
from moeplace.placement.placement_file import save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.recording.checkpoint_profile import profile_checkpoint
from moeplace.profiling.traces.file import load_trace

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
path = folder / "routing.trace"
tokens = profile_checkpoint(shipped("tiny-moe"), shipped_texts(), path, max_tokens=8192, batch_size=64)
trace = load_trace(path)
print(f"{tokens} tokens, {trace.num_layers} MoE layers, {trace.num_experts} experts, top-{trace.top_k}")

cluster = Cluster.uniform(4, slots_per_rank=4)
problem = Problem.from_trace(trace.split("train"), cluster, mode="coherent", objective="traffic", max_imbalance=1.05)
result = solve(problem, time_limit=5.0, seed=0)
print(f"{result.status}: {result.objective_name} {result.objective:.3f}, proven >= {result.lower_bound:.3f}")

base = index_order(trace.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank, mode="coherent")
for name, placement in (("index order", base), ("solved", result.placement)):
    found = problem.evaluate(placement, trace.split("test"))
    print(f"{name:12} stays {found.stay_rate:.1%}, imbalance {found.imbalance_mean:.2f} on held-out text")
save_placement(folder / "placement.json", result.placement, solver=result.summary())
