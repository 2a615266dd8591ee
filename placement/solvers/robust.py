"""Hedge against the sample: balance that is fitted to one set of sequences does not hold on the next.

A rank's load on unseen sequences deviates from its load on the training sequences. With x[s, e] = assignments of
expert e in sequence s, n[s] = assignments of the sequence and p[e] = overall share of expert e, the deviation of a
set of experts has, by the variance of a sum over independent sequences, the estimated variance

    Var(set) = 1' Q 1,    Q[e, f] = sum_s (x[s, e] - n[s] p[e]) (x[s, f] - n[s] p[f])

so experts that are hot in the same sequences should not share a rank. The searches add

    weight * tokens * sum over ranks of ( Var / (sigma0 m)^2 )^2,   m = mean load of a rank, sigma0 = 5 %

which is small while every rank's deviation stays below sigma0 and steep above; the square makes the worst rank count.
"""

import numpy as np

from moeplace.profiling.trace import RoutingTrace

SIGMA0 = 0.05


def risk_matrix(trace: RoutingTrace, ids_TK: np.ndarray, num_slots: int, num_ranks: int, weight: float) -> np.ndarray:
    """(S, S) matrix whose squared form over a rank's experts is the penalty of the module's docstring, in tokens.

    Args:
        trace: gives the sequences; without sequence ids the hedge is zero.
        ids_TK: (T, K) expert ids of one layer, -1 = none.
        num_slots: S >= E.
        num_ranks: R.
        weight: price of a rank whose deviation is sigma0, as a share of the layer's tokens; 0 = no hedge.
    """
    risk = np.zeros((num_slots, num_slots))
    if trace.sequence_ids is None or weight <= 0:
        return risk
    _, sequence_T = np.unique(trace.sequence_ids, return_inverse=True)
    sequences = int(sequence_T.max()) + 1
    if sequences < 8:  # too few to estimate a covariance from
        return risk
    token, slot = np.nonzero(ids_TK >= 0)
    cell = sequence_T[token] * num_slots + ids_TK[token, slot]
    count = np.bincount(cell, minlength=sequences * num_slots).reshape(sequences, num_slots).astype(np.float64)
    total = count.sum()
    if total == 0:
        return risk
    deviation = count - count.sum(axis=1, keepdims=True) * (count.sum(axis=0) / total)
    mean_rank = total / num_ranks
    scale = np.sqrt(weight * len(ids_TK)) / (SIGMA0 * mean_rank) ** 2
    return deviation.T @ deviation * scale
