"""k-sets of one layer as nets of a hypergraph, and the tables that price a swap of two experts exactly.

Swapping expert a on part g with b on part h changes the sum of d (parts that hold an expert of a token) by

    - G(a) - G(b) + N(a, h) + N(b, g) + B(a, b) + B(b, a)

    G(e)    tokens of e in which e is alone on its part
    N(e, p) tokens of e with no expert on part p
    B(a, b) tokens of a and b in which a is alone on its part

so a proposal costs a few table look-ups; only an accepted swap touches tokens. Parts are ranks, or nodes. An empty slot
is an expert without tokens.

Shape letters: T tokens, E experts, K top-k, R ranks, P parts, S slots.
"""

from typing import NamedTuple

import numpy as np

from moeplace.profiling.kernel_cache import njit


class LayerNets(NamedTuple):
    """k-sets of one layer.

    Attributes:
        ids_TK: (T, K) int16 expert ids, -1 = none.
        first_E: (S + 1,) int64, where each expert's tokens start in `token_of`.
        token_of: (assignments,) int32 tokens, grouped by expert.
        load_E: (S,) float64 assignments of each expert; entries beyond the layer's experts are empty slots.
        risk_EE: (S, S) float64 hedge: the sum over pairs of experts on one rank is added to the objective.
    """

    ids_TK: np.ndarray
    first_E: np.ndarray
    token_of: np.ndarray
    load_E: np.ndarray
    risk_EE: np.ndarray


class Level(NamedTuple):
    """The parts of all experts at one level (ranks or nodes) and the tables of the module's docstring, kept up to date.

    Attributes:
        part_E: (S,) int64 part of every expert and empty slot.
        count_TP: (T, P) uint8 experts of each token on each part.
        alone_E: (S,) int32, G. absent_EP: (S, P) int32, N. beside_EE: (S, S) int32, B.
    """

    part_E: np.ndarray
    count_TP: np.ndarray
    alone_E: np.ndarray
    absent_EP: np.ndarray
    beside_EE: np.ndarray


def layer_nets(ids_TK: np.ndarray, num_slots: int, risk_EE: np.ndarray | None = None) -> LayerNets:
    """The nets of a layer from its (T, K) expert ids, -1 = none."""
    risk_EE = np.zeros((num_slots, num_slots)) if risk_EE is None else risk_EE
    ids_TK = np.ascontiguousarray(ids_TK, dtype=np.int16)
    token, slot = np.nonzero(ids_TK >= 0)
    expert = ids_TK[token, slot]
    order = np.argsort(expert, kind="stable")
    load_E = np.bincount(expert, minlength=num_slots)
    first_E = np.concatenate([[0], np.cumsum(load_E)]).astype(np.int64)
    return LayerNets(ids_TK, first_E, token[order].astype(np.int32), load_E.astype(np.float64), risk_EE)


def level_of(nets: LayerNets, part_E: np.ndarray, num_parts: int) -> Level:
    """The tables of one level; `part_E` (S,) int64 becomes the level's own array."""
    tokens, slots = len(nets.ids_TK), len(part_E)
    level = Level(
        part_E,
        np.zeros((tokens, num_parts), np.uint8),
        np.zeros(slots, np.int32),
        np.zeros((slots, num_parts), np.int32),
        np.zeros((slots, slots), np.int32),
    )
    _fill_tables(nets.ids_TK, level)
    return level


def connectivity(nets: LayerNets, rank_E: np.ndarray, node_R: np.ndarray, node_weight: float) -> float:
    """sum over tokens of d + node_weight * dn, without replicas."""
    total = 0.0
    for part_E, size, weight in ((rank_E, len(node_R), 1.0), (node_R[rank_E], int(node_R[-1]) + 1, node_weight)):
        if weight:
            total += weight * float((level_of(nets, part_E, size).count_TP > 0).sum())
    return total


@njit(cache=True, nogil=True, inline="always")
def swap_gain(a, b, g, h, level):  # type: ignore[no-untyped-def]
    """Change of sum d by swapping expert a on part g with expert b on part h."""
    alone_E, absent_EP, beside_EE = level.alone_E, level.absent_EP, level.beside_EE
    return absent_EP[a, h] + absent_EP[b, g] - alone_E[a] - alone_E[b] + beside_EE[a, b] + beside_EE[b, a]


@njit(cache=True, nogil=True)
def swap_parts(a, b, g, h, nets, level):  # type: ignore[no-untyped-def]
    """Move expert a from part g to part h and b back, in the level's tables."""
    _move(a, g, h, nets, level)
    _move(b, h, g, nets, level)


@njit(cache=True, nogil=True)
def _fill_tables(ids_TK, level):  # type: ignore[no-untyped-def]
    part_E, count_TP, alone_E, absent_EP, beside_EE = level
    top_k, num_parts = ids_TK.shape[1], count_TP.shape[1]
    for t in range(len(ids_TK)):
        for k in range(top_k):
            if ids_TK[t, k] >= 0:
                count_TP[t, part_E[ids_TK[t, k]]] += 1
        for k in range(top_k):
            e = ids_TK[t, k]
            if e < 0:
                continue
            for p in range(num_parts):
                if count_TP[t, p] == 0:
                    absent_EP[e, p] += 1
            if count_TP[t, part_E[e]] == 1:
                alone_E[e] += 1
                for j in range(top_k):
                    if ids_TK[t, j] >= 0:
                        beside_EE[e, ids_TK[t, j]] += 1


@njit(cache=True, nogil=True)
def _move(a, g, h, nets, level):  # type: ignore[no-untyped-def]
    """Move expert `a` from part g to part h in one pass over its tokens."""
    ids_TK, first_E, token_of = nets.ids_TK, nets.first_E, nets.token_of
    part_E, count_TP, alone_E, absent_EP, beside_EE = level
    top_k = ids_TK.shape[1]
    for i in range(first_E[a], first_E[a + 1]):
        t = token_of[i]
        count_TP[t, g] -= 1
        left = count_TP[t, g]
        if left == 0:  # a was alone on g
            alone_E[a] -= 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0:
                    absent_EP[e, g] += 1
                    beside_EE[a, e] -= 1
        elif left == 1:  # another expert is alone on g now
            f = _other_on(a, g, t, ids_TK, part_E)
            alone_E[f] += 1
            for k in range(top_k):
                if ids_TK[t, k] >= 0:
                    beside_EE[f, ids_TK[t, k]] += 1
        there = count_TP[t, h]
        count_TP[t, h] += 1
        if there == 0:
            alone_E[a] += 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0:
                    absent_EP[e, h] -= 1
                    beside_EE[a, e] += 1
        elif there == 1:  # the one that was alone on h is so no more
            f = _other_on(a, h, t, ids_TK, part_E)
            alone_E[f] -= 1
            for k in range(top_k):
                if ids_TK[t, k] >= 0:
                    beside_EE[f, ids_TK[t, k]] -= 1
    part_E[a] = h


@njit(cache=True, nogil=True, inline="always")
def _other_on(a, part, t, ids_TK, part_E):  # type: ignore[no-untyped-def]
    """The last expert of token t on a part that is not `a`."""
    f = -1
    for k in range(ids_TK.shape[1]):
        e = ids_TK[t, k]
        if e >= 0 and e != a and part_E[e] == part:
            f = e
    return f
