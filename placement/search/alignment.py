"""Free alignment: ranks of a layer may be renamed without changing its traffic or balance, so name them well.

With clusters of experts fixed in every layer, the names that keep most tokens in place follow from one assignment
problem per boundary, composed forward; that is optimal over all renamings (MoETuner's second program, uniform links,
in polynomial time). Only equal ranks exchange names (`Symmetry`).

Shape letters: L MoE layers, R ranks.
"""

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.symmetry import Symmetry


def aligned(problem: Problem, slots_LS: np.ndarray) -> np.ndarray:
    """Rename ranks layer by layer so that tokens (coherent: their owners) meet their experts where they are.

    Ranks per token and balance do not change.
    """
    placement = problem.placement(slots_LS)
    if problem.cluster.distance_RR is not None:
        return slots_LS  # names matter
    flow_LRR = (owner_flow if problem.mode == "coherent" else primary_flow)(problem, placement)
    return rename_ranks(slots_LS, align_ranks(flow_LRR, problem.cluster), problem)


def align_ranks(flow_LRR: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(L, R) new name of every rank of every layer, given the tokens between ranks of consecutive layers.

    Args:
        flow_LRR: (L-1, R, R) tokens from rank to rank under the present names.
        cluster: decides which ranks may exchange names.
    """
    symmetry, names = Symmetry(cluster), [np.arange(cluster.num_ranks)]
    for flow_RR in flow_LRR:
        flow = np.empty(flow_RR.shape)
        flow[names[-1]] = flow_RR  # rows by the new names of the layer before
        # Tokens that stay in the node count most; staying on the rank decides ties.
        names.append(symmetry.best_names(flow.T, by_block=cluster.num_nodes > 1))
    return np.stack(names)


def primary_flow(problem: Problem, placement: Placement) -> np.ndarray:
    """(L-1, R, R) tokens whose primary expert is on rank i, then on rank j (first replica)."""
    ranks = problem.num_ranks
    flow = np.zeros((problem.num_layers - 1, ranks, ranks))
    for layer, counts_EE in enumerate(problem.transitions_LEE):
        before, after = placement.rank_of_expert[layer], placement.rank_of_expert[layer + 1]
        i, j = np.nonzero(counts_EE)
        np.add.at(flow[layer], (before[i], after[j]), counts_EE[i, j])
    return flow


def owner_flow(problem: Problem, placement: Placement) -> np.ndarray:
    """(L-1, R, R) tokens owned by rank i in a layer (most of their experts) that rank j serves in the next."""
    assert problem.trace is not None
    ranks = problem.num_ranks
    flow = np.zeros((problem.num_layers - 1, ranks, ranks))
    owner_T = np.zeros(problem.trace.num_tokens, np.int64)
    for layer in range(problem.num_layers):
        ids_TK = problem.trace.layer(layer)
        token, slot = np.nonzero(ids_TK >= 0)
        rank = placement.rank_of_expert[layer][ids_TK[token, slot]]
        count_TR = np.bincount(token * ranks + rank, minlength=len(ids_TK) * ranks).reshape(-1, ranks)
        if layer:
            for owner in range(ranks):
                flow[layer - 1, owner] = (count_TR[owner_T == owner] > 0).sum(axis=0)
        owner_T = np.where(count_TR.any(axis=1), count_TR.argmax(axis=1), owner_T)
    return flow


def rename_ranks(slots_LS: np.ndarray, names_LR: np.ndarray, problem: Problem) -> np.ndarray:
    """Move every rank's experts to the rank of its new name."""
    rank_of_slot = problem.cluster.rank_of_slot
    renamed = np.empty_like(slots_LS)
    for layer, names_R in enumerate(names_LR):
        for rank, name in enumerate(names_R):
            renamed[layer, rank_of_slot == name] = slots_LS[layer, rank_of_slot == rank]
    return renamed
