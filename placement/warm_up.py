"""`python -m moeplace.placement.warm_up` compiles the numba kernels, so that no real command waits for it.

Numba keeps what it compiled (`profiling/kernel_cache.py` says where); this uses every kernel on a problem of a few
experts, with the array types that real problems have. A test finds a kernel that is left out.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_rule import REPLICA_RULES
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HostTier, Memory
from moeplace.placement.policy.warm_up import use_kernels
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.plan import plan
from moeplace.placement.solve import solve
from moeplace.placement.tiers.evaluation import evaluate_tiers
from moeplace.placement.tiers.joint import plan_tiers
from moeplace.placement.tiers.policy import Policy, Predictor
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.kernel_cache import NO_WARM_UP, POLICY_WARM_UP, mark_compiled
from moeplace.profiling.scores.drift import measure_drift
from moeplace.profiling.scores.summary import summarize
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace

EXPERTS = 8


def warm_up() -> None:
    """Use every kernel once on a tiny instance."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((240, 2, EXPERTS)), axis=2)[:, :, :2].astype(np.int16)
    trace = RoutingTrace(ids, np.full(2, EXPERTS), sequence_ids=np.arange(240) // 20)
    _search(trace)
    _balance(trace)
    _tiers(trace)
    use_kernels()
    _serve(trace)
    _score(trace)
    _read(trace.topk_ids)


def _search(trace: RoutingTrace) -> None:
    """The searches and bounds of `auto` in every mode, with replicas, on nodes, and with lost ranks to survive."""
    flat = Cluster.uniform(4, slots_per_rank=2)
    nodes = Cluster.uniform(4, slots_per_rank=3, ranks_per_node=2)
    spare = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=2)
    wide = np.argsort(np.random.default_rng(1).random((60, 1, 12)), axis=2)[:, :, :9].astype(np.int16)
    for tokens, cluster, mode, survive in (
        (trace, flat, "dispatch-combine", 0),
        (RoutingTrace(wide, np.full(1, 12)), nodes, "dispatch-combine", 0),  # k-sets too large for all their subsets
        (trace, nodes, "dispatch-combine", 0),
        (trace, spare, "dispatch-combine", 1),
        (trace.primary(), flat, "coherent", 0),
        (trace.primary(), spare, "coherent", 1),
        (trace, flat, "coherent", 0),
        (trace, flat, "allgather", 0),
    ):
        problem = Problem.from_trace(
            tokens, cluster, mode=mode, objective="traffic", max_imbalance=1.5, survive=survive
        )
        for _ in range(2):  # the first may spend its limit compiling, before it comes to its last kernels
            found = solve(problem, time_limit=0.2)
        if mode != "allgather":
            near = problem.replace(previous=found.placement, max_moves=2)
            solve(near.replace(max_imbalance=None, survive=0), time_limit=0.2)


def _tiers(trace: RoutingTrace) -> None:
    """Experts that do not fit: search and walk."""
    memory = Memory(HostTier(bandwidth=1e6), fast_slots=np.ones(4))
    cluster = Cluster.uniform(4, slots_per_rank=2).replace(memory=memory)
    start = solve(Problem.from_trace(trace, cluster), solver="index-order").placement
    terms = TierTerms(cluster, StepShape(batch=8))
    plan_tiers(trace, start, Policy("pinned"), terms)
    evaluate_tiers(trace, start, Policy("lookahead", Predictor(0.5)), terms)


def _balance(trace: RoutingTrace) -> None:
    """Searches that see loads alone, and the published rules."""
    for cluster in (Cluster.uniform(4, slots_per_rank=3), Cluster.uniform(4, slots_per_rank=3, ranks_per_node=2)):
        solve(Problem.from_trace(trace, cluster, objective="traffic"), solver="eplb")
    solve(Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=3)), time_limit=0.2)
    skewed_LE = np.array([[40.0, 40.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]])  # packing leaves it above its bound
    solve(Problem.from_load(skewed_LE, Cluster.uniform(8, slots_per_rank=2)), time_limit=0.2)
    running_LS = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 0, -1, 1], [*range(7), -1, -1, 1, 2, 3]])
    for previous in (None, running_LS):
        plan(np.arange(2.0 * EXPERTS).reshape(2, -1), ranks=4, slots_per_rank=3, nodes=2, previous=previous)
    chain = Problem.from_trace(
        trace.primary(), Cluster.uniform(2, slots_per_rank=4), mode="coherent", objective="traffic"
    )
    solve(chain, solver="viterbi")


def _serve(trace: RoutingTrace) -> None:
    """Every replica rule, on experts with two slots each."""
    cluster = Cluster.uniform(4, slots_per_rank=4)
    placement = Problem.from_trace(trace, cluster).placement(np.tile(np.arange(EXPERTS), (2, 2)))
    for rule in REPLICA_RULES.values():
        Problem.from_trace(trace, cluster, replica_rule=rule).evaluate(placement)


def _score(trace: RoutingTrace) -> None:
    """What `moeplace stats` says."""
    summarize(trace, seed=0)
    measure_drift(trace, trace, seed=0, splits=2)


def _read(ids_TLK: np.ndarray) -> None:
    """What an import checks and mends, with and without weights."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "routing.npz"
        arrays = {"experts": ids_TLK, "sequence_ids": np.arange(len(ids_TLK)) // 20}
        for named in (arrays, arrays | {"weights": np.ones(ids_TLK.shape, np.float32)}):
            np.savez(source, **named)  # type: ignore[arg-type]  # its stub takes every keyword for `allow_pickle`
            import_from("npz", source, Path(folder) / "copy", ImportOptions(num_experts=EXPERTS))
            load_trace(Path(folder) / "copy")


if __name__ == "__main__":
    os.environ[NO_WARM_UP] = "1"  # `solve` would ask for what is being done
    warm_up()
    mark_compiled()
    mark_compiled(POLICY_WARM_UP)
