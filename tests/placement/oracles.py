"""Brute force over all placements of tiny problems, and the traffic objective in its own words."""

import itertools
from collections.abc import Iterator

import numpy as np

from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem


def layer_rows(problem: Problem, layer: int, *, fill: bool = False) -> list[np.ndarray]:
    """All rows of slots (S,) of one layer, up to the order of slots inside a rank; with `fill` no slot stays empty."""
    experts, slots_R = int(problem.experts_per_layer[layer]), problem.cluster.slots_of_rank
    choices = []
    for slots in slots_R:
        sizes = [min(int(slots), experts)] if fill else range(min(int(slots), experts) + 1)
        choices.append([held for size in sizes for held in itertools.combinations(range(experts), size)])
    rows = []
    for held in itertools.product(*choices):
        if set().union(*held) == set(range(experts)):
            padded = [list(h) + [-1] * (int(s) - len(h)) for h, s in zip(held, slots_R, strict=True)]
            rows.append(np.array(list(itertools.chain.from_iterable(padded)), np.int32))
    return rows


def all_placements(problem: Problem, *, fill: bool = False) -> Iterator[Placement]:
    """Every placement of a problem; without replicas every slot is used, or as many as there are experts."""
    rows = [layer_rows(problem, layer, fill=fill) for layer in range(problem.num_layers)]
    for chosen in itertools.product(*rows):
        yield problem.placement(np.stack(chosen))


def traffic_of(problem: Problem, evaluation: Evaluation) -> float:
    """The traffic objective of a problem's mode."""
    if problem.mode == "allgather":
        return 0.0
    if problem.mode == "dispatch-combine":
        return evaluation.ranks_per_token + problem.node_weight * evaluation.nodes_per_token
    return evaluation.copies_per_token + problem.node_weight * evaluation.node_copies_per_token


def chain_cost(rank_LS: np.ndarray, transitions_LSS: np.ndarray, cost_RR: np.ndarray) -> float:
    """Tokens times cost over all boundaries, pair by pair."""
    total = 0.0
    for layer, flow_SS in enumerate(transitions_LSS):
        for i, j in zip(*np.nonzero(flow_SS), strict=True):
            total += float(flow_SS[i, j] * cost_RR[rank_LS[layer, i], rank_LS[layer + 1, j]])
    return total


def best_traffic(problem: Problem, caps_L: np.ndarray | None = None) -> float:
    """Least traffic over all placements whose layers keep their caps."""
    best = np.inf
    for placement in all_placements(problem):
        evaluation = problem.evaluate(placement)
        if caps_L is None or (evaluation.imbalance_L <= caps_L + 1e-9).all():
            best = min(best, traffic_of(problem, evaluation))
    return float(best)
