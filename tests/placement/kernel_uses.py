"""Uses of moeplace that reach its kernels, on random instances of other sizes and types than those of the warm-up."""

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import DiskTier, HostCompute, HostTier, Memory
from moeplace.placement.policy.planning import plan
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.placement.tiers.evaluation import evaluate_tiers
from moeplace.placement.tiers.joint import plan_tiers
from moeplace.placement.tiers.policy import POLICIES, Policy, Predictor
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.scores.drift import measure_drift
from moeplace.profiling.scores.summary import summarize
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.trace import RoutingTrace

SECONDS = 0.15


def random_trace(rng: np.random.Generator, *, top_k: int, layers: int = 3) -> RoutingTrace:
    """Experts that differ per layer now and then, tokens without an expert in some slots."""
    tokens, experts = int(rng.integers(60, 200)), 12
    experts_L = np.full(layers, experts)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k].astype(np.int16)
    if top_k > 1:
        ids[rng.random(tokens) < 0.1, :, -1] = -1
    sequences = np.sort(rng.integers(0, 8, tokens))
    weights = np.sort(rng.random(ids.shape).astype(np.float32))[..., ::-1] if rng.random() < 0.5 else None
    return RoutingTrace(ids, experts_L, sequence_ids=sequences, topk_weights=weights)


def use_searches(seed: int) -> None:
    """`auto` in every mode and objective, with and without replicas, nodes and a cap; uneven ranks; a previous one."""
    rng = np.random.default_rng(seed)
    for mode, objective, slots, nodes in itertools.product(
        ("dispatch-combine", "coherent", "allgather"), ("traffic", "seconds"), (3, 4), (1, 2)
    ):
        trace = random_trace(rng, top_k=1 if mode == "coherent" else 3)
        cluster = Cluster.uniform(4, slots_per_rank=slots, ranks_per_node=4 // nodes)
        cap = None if rng.random() < 0.5 else 1.5
        problem = Problem.from_trace(trace, cluster, mode=mode, objective=objective, max_imbalance=cap)
        found = solve(problem, time_limit=SECONDS, seed=seed).placement
        evaluate(trace, found)
        if rng.random() < 0.3:
            solve(problem.replace(previous=found, max_moves=rng.choice((None, 3))), time_limit=SECONDS)


def use_loads(seed: int) -> None:
    """Loads without tokens, integers and floats, by each solver that needs nothing else."""
    rng = np.random.default_rng(seed)
    for nodes, kind in itertools.product((1, 2), (np.int64, np.float64)):
        load_LE = (rng.random((3, 12)) * 1000).astype(kind)
        cluster = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=4 // nodes)
        for solver in ("auto", "lpt", "eplb", "index-order", "round-robin"):
            solve(Problem.from_load(load_LE, cluster), solver=solver, time_limit=SECONDS)


def use_scores(seed: int) -> None:
    """Figures and drift, of a trace in memory and of one read from a file."""
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, top_k=3)
    with TemporaryDirectory() as folder:
        save_trace(Path(folder) / "t", trace)
        for one in (trace, load_trace(Path(folder) / "t")):
            summarize(one, seed=seed)
            measure_drift(trace, one, seed=seed, splits=2)
            solve(Problem.from_trace(one, Cluster.uniform(4, slots_per_rank=3)), time_limit=SECONDS)


def use_policy(seed: int) -> None:
    """What engines ask: whole counts of one step or of several, with and without a map in force."""
    rng = np.random.default_rng(seed)
    load_TLE = rng.integers(0, 900, (4, 2, 12)).astype(np.int32)
    start_LS = np.tile(np.arange(16) % 12, (2, 1))
    for load in (load_TLE, load_TLE.sum(axis=0), load_TLE.astype(np.float32)):
        for previous in (None, start_LS, start_LS.astype(np.int32), np.where(np.arange(16) < 8, start_LS, -1)):
            plan(load, ranks=4, slots_per_rank=4, nodes=2, groups=4, previous=previous, max_moves=5, wait=True)


def use_tiers(seed: int) -> None:
    """Plans and walks of experts that do not fit: every policy, with and without foresight, hosts, disks, weights."""
    rng = np.random.default_rng(seed)
    compute = HostCompute(1e-5, 1e-6)
    for mode, policy in itertools.product(("dispatch-combine", "coherent", "allgather"), POLICIES):
        trace = random_trace(rng, top_k=1 if mode == "coherent" else 3)
        memory = Memory(
            HostTier(1e9, compute=compute if rng.random() < 0.5 else None),
            disk=DiskTier(1e8) if rng.random() < 0.5 else None,
            fast_slots=np.full(4, 2) if rng.random() < 0.5 else np.full(4, 2.0), transit=2,
        )  # fmt: skip
        cluster = Cluster.uniform(4, slots_per_rank=3).replace(memory=memory)
        start = solve(Problem.from_trace(trace, cluster, mode=mode), solver="lpt").placement
        chosen = Policy(policy, Predictor(0.8, 2) if policy == "lookahead" or rng.random() < 0.5 else None)
        terms = TierTerms(cluster, StepShape(batch=int(rng.integers(1, 9))), mode=mode)
        plan_tiers(trace, start, chosen, terms, seed=seed)
        evaluate_tiers(trace, start, chosen, terms)


USES: dict[str, Callable[[int], None]] = {
    "searches": use_searches,
    "loads": use_loads,
    "scores": use_scores,
    "policy": use_policy,
    "tiers": use_tiers,
}
