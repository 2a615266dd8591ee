"""What a problem minimises, measured on a placement by `evaluate`; solvers claim nothing else.

Shape letters: L MoE layers, E experts, R ranks.
"""

import numpy as np

from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem


def measure(problem: Problem, placement: Placement) -> tuple[str, float, dict[str, float]]:
    """(name of the objective, its value, values of "traffic", "imbalance" and "seconds") of a placement."""
    if problem.trace is None:
        imbalance = load_imbalance(problem, placement)
        return "imbalance", float(imbalance.mean()), {"imbalance": float(imbalance.mean())}
    return measured(problem, problem.evaluate(placement))


def measured(problem: Problem, evaluation: Evaluation) -> tuple[str, float, dict[str, float]]:
    """`measure` of a placement that was evaluated already."""
    values = {
        "traffic": traffic(problem, evaluation),
        "imbalance": evaluation.imbalance_mean,
        "seconds": evaluation.predicted_seconds,
    }
    name = "imbalance" if problem.mode == "allgather" and problem.objective == "traffic" else problem.objective
    return name, values[name], values


def traffic(problem: Problem, evaluation: Evaluation) -> float:
    """The mode's traffic at the prices of links: of serving ranks and nodes per token, or of copies per token, or 0.

    With the two tiers of links that is mean d + node_weight * mean dn, or copies + node_weight * those between nodes.
    """
    prices = problem.prices
    if problem.mode == "dispatch-combine":
        paid = (evaluation.served_LR @ prices.rank_R + evaluation.served_LN @ prices.node_N).sum()
        return float(paid / (evaluation.tokens * len(evaluation.served_LR)))
    if problem.mode == "allgather":
        return 0.0
    return float((evaluation.moved_RR * prices.pair_RR).sum())


def load_imbalance(problem: Problem, placement: Placement) -> np.ndarray:
    """(L,) imbalance by layer when an expert's load is split evenly over its replicas."""
    part_LE = problem.load_LE / np.maximum(placement.replica_counts, 1)
    time_LR = np.einsum("le,ler->lr", part_LE, placement.copies_LER) / problem.cluster.speed_of_rank
    fair_L = problem.load_LE.sum(axis=1) / problem.cluster.speed_of_rank.sum()
    return np.divide(time_LR.max(axis=1), fair_L, out=np.ones(len(fair_L)), where=fair_L > 0)


def survival_deficit(problem: Problem, placement: Placement) -> int:
    """Ranks and nodes that experts miss to survive the loss of `survive` ranks, over all layers; 0 = all survive."""
    if not problem.survive:
        return 0
    copies = problem.survive + 1
    ranks_LE = placement.replica_counts
    held_LEN = [placement.copies_LER[:, :, placement.node_of_rank == n].any(axis=2) for n in range(placement.num_nodes)]
    nodes_LE = np.sum(held_LEN, axis=0)
    missing_LE = np.maximum(copies - ranks_LE, 0) + np.maximum(min(copies, placement.num_nodes) - nodes_LE, 0)
    return int(missing_LE[ranks_LE > 0].sum())
