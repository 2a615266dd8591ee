"""Hedge against the sample: balance that is fitted to one set of sequences does not hold on the next.

A rank's load on unseen sequences deviates from its load on the training sequences. With x[s, e] = assignments of
expert e in sequence s, n[s] = assignments of the sequence and p[e] = overall share of expert e, the deviation of a
set of experts has, by the variance of a sum over independent sequences, the estimated variance

    Var(set) = 1' Q 1,    Q[e, f] = sum_s (x[s, e] - n[s] p[e]) (x[s, f] - n[s] p[f])

so experts that are hot in the same sequences should not share a rank. The searches add

    weight * tokens * mean over ranks of ( Var(rank) / Var0 )^2

with Var0 the mean variance of the packed layer's ranks: what balance alone gives. The square makes the worst rank
count.
"""

import numpy as np

from moeplace.profiling.traces.trace import RoutingTrace

FEWEST_SEQUENCES = 8
"""Below this many sequences their covariance is not estimated: no hedge."""


def risk_matrix(trace: RoutingTrace, ids_TK: np.ndarray, packed_S: np.ndarray, weight: float) -> np.ndarray:
    """(S, S) matrix whose squared form over a rank's experts is the penalty of the module's docstring, in tokens.

    Args:
        trace: gives the sequences; without sequence ids the hedge is zero.
        ids_TK: (T, K) expert ids of one layer, -1 = none.
        packed_S: (S,) rank of every expert and empty slot in the packed layer.
        weight: price of ranks that vary as in the packed layer, as a share of the layer's tokens; 0 = no hedge.
    """
    slots, ranks = len(packed_S), int(packed_S.max()) + 1
    risk_SS = np.zeros((slots, slots))
    if trace.sequence_ids is None or weight <= 0:
        return risk_SS
    _, sequence_T = np.unique(trace.sequence_ids, return_inverse=True)
    sequences = int(sequence_T.max()) + 1
    if sequences < FEWEST_SEQUENCES:
        return risk_SS
    token, slot = np.nonzero(ids_TK >= 0)
    cell = sequence_T[token] * slots + ids_TK[token, slot]
    count = np.bincount(cell, minlength=sequences * slots).reshape(sequences, slots).astype(np.float64)
    share_S = count.sum(axis=0) / max(count.sum(), 1.0)
    deviation = count - count.sum(axis=1, keepdims=True) * share_S
    on_rank_SR = (packed_S[:, None] == np.arange(ranks)).astype(np.float64)
    variance = float(((deviation @ on_rank_SR) ** 2).sum()) / ranks
    if variance <= 0:
        return risk_SS
    return deviation.T @ deviation * (np.sqrt(weight * len(ids_TK) / ranks) / variance)
