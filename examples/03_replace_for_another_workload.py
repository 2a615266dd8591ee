"""The workload changes: place again, but move as little as needed, and plan the transfers.

python examples/03_replace_for_another_workload.py routing.trace      # of example 01
"""

import sys

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.traces.file import load_trace

trace = load_trace(sys.argv[1])
first, *_, last = trace.workload_names
before = trace.select(trace.workload == trace.workload_names.index(first))
after = trace.select(trace.workload == trace.workload_names.index(last))
cluster = Cluster.uniform(4, slots_per_rank=4)
options = {"mode": "coherent", "objective": "traffic", "max_imbalance": 1.1}
old = solve(Problem.from_trace(before, cluster, **options), time_limit=3.0, seed=0).placement

for most in (0, 2, 4, None):
    limits = {} if most is None else {"max_moves": most}
    problem = Problem.from_trace(after, cluster, previous=old, **options, **limits)
    new = solve(problem, time_limit=3.0, seed=0).placement
    plan = plan_migration(old, new, cluster=cluster, expert_bytes=int(trace.expert_bytes[0, 0]))
    found = problem.evaluate(new)
    print(
        f"from {first} to {last}, at most {'any' if most is None else most} moves per layer: "
        f"stays {found.stay_rate:.1%}, imbalance {found.imbalance_mean:.2f}, "
        f"{sum(len(r) for r in plan.rounds)} transfers in {len(plan.rounds)} rounds"
    )
