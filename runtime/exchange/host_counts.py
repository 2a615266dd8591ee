"""Who serves a token, and who is to own it, worked out on the host.

Shape letters: N tokens, K top-k, R ranks.
"""

import numpy as np


def count_by_rank(rank_NK: np.ndarray, num_ranks: int) -> np.ndarray:
    """(N, R) int64: experts of each token that each rank serves; -1 counts nowhere."""
    tokens, width = len(rank_NK), num_ranks + 1
    column_NK = np.where(rank_NK >= 0, rank_NK, num_ranks) + np.arange(tokens)[:, None] * width
    return np.bincount(column_NK.reshape(-1), minlength=tokens * width).reshape(tokens, width)[:, :num_ranks]


def choose_owner(count_NR: np.ndarray, before_N: np.ndarray) -> np.ndarray:
    """(N,) int64 new owner of each token.

    The rank that serves most of its experts; ties go to the owner before, then to the lowest rank; a token without
    experts stays.

    Args:
        count_NR: (N, R) experts of each token on each rank.
        before_N: (N,) owner before.
    """
    score_NR = 2 * count_NR + (np.arange(count_NR.shape[1]) == before_N[:, None])
    best_N = np.where(count_NR > 0, score_NR, -1).argmax(axis=1)  # the first of equals: the lowest rank
    owner_N: np.ndarray = np.where(count_NR.any(axis=1), best_N, before_N)
    return owner_N


def gateways_of(count_NR: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """(N, R) bool: the rank of each node that takes the copy of a token, where some of its experts are on the node.

    It is the rank with most of them there, the lowest of equals.
    """
    found_NR = np.zeros(count_NR.shape, bool)
    for node in range(int(node_of_rank[-1]) + 1):
        here = np.flatnonzero(node_of_rank == node)
        count_Nn = count_NR[:, here]
        token = np.flatnonzero(count_Nn.any(axis=1))
        found_NR[token, here[count_Nn[token].argmax(axis=1)]] = True
    return found_NR
