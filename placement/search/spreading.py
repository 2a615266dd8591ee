"""Replicas on several nodes: whether there is room decides a maximum flow, which also places them.

    source -> expert e           exactly as many units as e needs replicas
    e -> (e, node n)             at least one unit where e must be on every node, at most one where there are more nodes
                                 than replicas
    (e, n) -> each rank of n     at most one: no expert twice on a rank
    rank -> sink                 at most its slots

Lower bounds are moved to a second source and sink in the usual way (Ahuja, Magnanti, Orlin 1993, section 6.7).

Shape letters: E experts of a layer, R ranks, N nodes, S slots per layer.
"""

from collections import Counter

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from moeplace.placement.placement import EMPTY_SLOT, slot_starts


def held_on_nodes(experts: int, replicas: int, slots_R: np.ndarray, node_R: np.ndarray) -> np.ndarray | None:
    """(E, R) bool: every expert on `replicas` ranks, on as many nodes as there may be; None if there is no room."""
    ranks, nodes = len(slots_R), int(node_R[-1]) + 1
    on_every = replicas >= nodes
    pair, rank = 4 + experts, 4 + experts + experts * nodes  # first vertex of the (expert, node) pairs, of the ranks
    source, sink, more, less = range(4)
    arcs: Counter[tuple[int, int]] = Counter({(sink, source): experts * replicas})
    for e in range(experts):
        arcs[more, 4 + e] += replicas
        arcs[source, less] += replicas
        for n in range(nodes):
            size = int((node_R == n).sum())
            arcs[4 + e, pair + e * nodes + n] += size - 1 if on_every else 1
            if on_every:
                arcs[more, pair + e * nodes + n] += 1
                arcs[4 + e, less] += 1
        for r in range(ranks):
            arcs[pair + e * nodes + int(node_R[r]), rank + r] += 1
    for r in range(ranks):
        arcs[rank + r, sink] += int(slots_R[r])
    tails, heads = np.array(list(arcs), np.int32).T
    size = rank + ranks
    graph = csr_array((np.array(list(arcs.values()), np.int32), (tails, heads)), shape=(size, size))
    found = maximum_flow(graph, more, less)
    if found.flow_value < sum(count for (tail, _), count in arcs.items() if tail == more):
        return None
    flow = found.flow.toarray()[pair:rank, rank:].reshape(experts, nodes, ranks)
    held_ER: np.ndarray = np.any(flow > 0, axis=1)
    return held_ER


def fill_and_balance(held_ER: np.ndarray, load_E: np.ndarray, slots_R: np.ndarray, node_R: np.ndarray) -> np.ndarray:
    """(S,) int32 slots: free ones get the heaviest experts per replica, then swaps lower the busiest rank.

    No swap takes an expert from a node that it must be on.
    """
    held_ER = held_ER.copy()
    must_E = np.array([len(set(node_R[row].tolist())) for row in held_ER])
    for r in np.argsort(held_ER.T @ (load_E / held_ER.sum(axis=1)), kind="stable"):
        while held_ER[:, r].sum() < min(slots_R[r], len(load_E)):
            share_E = np.where(held_ER[:, r], -1.0, load_E / held_ER.sum(axis=1))
            held_ER[int(share_E.argmax()), r] = True
    for _ in range(4 * len(load_E)):
        step = _best_swap(held_ER, load_E, node_R, must_E)
        if step is None:
            break
        a, g, b, h = step
        held_ER[[a, a, b, b], [g, h, h, g]] = [False, True, False, True]
    row_S = np.full(int(slots_R.sum()), EMPTY_SLOT, np.int32)
    for rank, start in enumerate(slot_starts(slots_R)):
        experts = np.flatnonzero(held_ER[:, rank])
        row_S[start : start + len(experts)] = experts
    return row_S


def _best_swap(
    held_ER: np.ndarray, load_E: np.ndarray, node_R: np.ndarray, must_E: np.ndarray
) -> tuple[int, int, int, int] | None:
    """(a, g, b, h): expert a of the busiest rank g for a lighter b of h, the larger time of both falling most."""
    share_E = load_E / held_ER.sum(axis=1)
    load_R = held_ER.T @ share_E
    g = int(load_R.argmax())
    best, step = load_R[g] * (1 - 1e-9), None
    for h in np.flatnonzero(load_R < load_R[g]).tolist():
        for a in np.flatnonzero(held_ER[:, g] & ~held_ER[:, h]).tolist():
            for b in np.flatnonzero(held_ER[:, h] & ~held_ER[:, g] & (share_E < share_E[a])).tolist():
                shift = share_E[a] - share_E[b]
                larger = max(load_R[g] - shift, load_R[h] + shift)
                if (
                    larger < best
                    and _stays(a, g, h, held_ER, node_R, must_E)
                    and _stays(b, h, g, held_ER, node_R, must_E)
                ):
                    best, step = larger, (a, g, b, h)
    return step


def _stays(e: int, g: int, h: int, held_ER: np.ndarray, node_R: np.ndarray, must_E: np.ndarray) -> bool:
    """Whether expert e is on as many nodes as it must be once it is on rank h instead of g."""
    ranks = [r for r in np.flatnonzero(held_ER[e]).tolist() if r != g] + [h]
    return len({int(node_R[r]) for r in ranks}) >= must_E[e]
