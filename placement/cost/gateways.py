"""Gateways: between nodes a row travels once, to the rank of the same place in the other node, which forwards it.

Rank i of a node sends to rank i of every other node (modulo that node's ranks), so that all links share the work.

Shape letters: R ranks, N nodes.
"""

import numpy as np


def gateways(node_R: np.ndarray) -> np.ndarray:
    """(R, N) int64: the rank at which rows of each rank enter each node; itself in its own."""
    size_N = np.bincount(node_R)
    start_N = np.cumsum(size_N) - size_N
    rank_R = np.arange(len(node_R))
    gateway_RN = start_N + (rank_R - start_N[node_R])[:, None] % size_N
    gateway_RN[rank_R, node_R] = rank_R
    return gateway_RN


def through_gateways(wanted_RR: np.ndarray, entering_RN: np.ndarray, node_R: np.ndarray) -> np.ndarray:
    """(R, R) copies from rank to rank, 0 on the diagonal, where rows pass through gateways.

    Args:
        wanted_RR: rows of each rank that each rank wants.
        entering_RN: rows of each rank that any rank of each node wants: what crosses to that node.
        node_R: (R,) node of each rank.
    """
    ranks = np.arange(len(node_R))
    gateway_RN = gateways(node_R)
    copies_RR = np.zeros(wanted_RR.shape)
    np.add.at(copies_RR, (gateway_RN[:, node_R], np.broadcast_to(ranks, wanted_RR.shape)), wanted_RR)
    np.add.at(copies_RR, (np.broadcast_to(ranks[:, None], gateway_RN.shape), gateway_RN), entering_RN)
    copies_RR[ranks, ranks] = 0.0
    return copies_RR
