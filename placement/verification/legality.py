"""Whether a placement is one at all, and keeps what its statement promises: sentences, one for each broken rule.

Shape letters: L MoE layers, E experts, R ranks, N nodes, S slots.
"""

from typing import Any

import numpy as np

from moeplace.placement.verification.statement import UNREADABLE, Statement, what_is_wrong
from moeplace.profiling.errors import FormatError

ROUNDING = 1e-6


def slots_of(document: Any) -> tuple[np.ndarray, np.ndarray]:
    """((L, S) expert of each slot, (R,) slots of each rank) of a placement file's document.

    Raises:
        FormatError: they are not there, or not such arrays.
    """
    try:
        rows, ranks = np.asarray(document["slot_to_expert"]), int(document["num_ranks"])
        slots_R = np.array(np.broadcast_to(np.asarray(document["slots_per_rank"], dtype=np.int64), (ranks,)))
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or rows.shape[1] != slots_R.sum():
            raise ValueError(f"slot_to_expert must be integers (layers, {int(slots_R.sum())})")
    except UNREADABLE as error:
        raise FormatError(f"the placement cannot be read: {what_is_wrong(error)}") from error
    return rows.astype(np.int64), slots_R


def broken_rules(statement: Statement, slots_LS: np.ndarray, slots_R: np.ndarray) -> list[str]:
    """Every rule of a placement, and of its statement without the load cap, that it breaks."""
    if len(slots_LS) != len(statement.experts_L):
        return [f"{len(slots_LS)} layers of slots, {len(statement.experts_L)} of experts"]
    if len(slots_R) != statement.num_ranks:
        return [f"{len(slots_R)} ranks in the placement, {statement.num_ranks} in the problem"]
    rank_S = np.repeat(np.arange(len(slots_R)), slots_R)
    broken = []
    for layer, (row_S, experts) in enumerate(zip(slots_LS, statement.experts_L, strict=True)):
        broken += [f"MoE layer {layer}: {rule}" for rule in _broken_row(statement, row_S, rank_S, int(experts))]
    return broken + _broken_capacity(statement, slots_LS, slots_R, rank_S)


def _broken_row(statement: Statement, row_S: np.ndarray, rank_S: np.ndarray, experts: int) -> list[str]:
    if row_S.min() < -1 or row_S.max() >= experts:
        return [f"an id lies outside -1..{experts - 1}"]
    held_ER = np.zeros((experts, statement.num_ranks), np.int64)
    filled = np.flatnonzero(row_S >= 0)
    np.add.at(held_ER, (row_S[filled], rank_S[filled]), 1)
    broken = []
    if (held_ER > 1).any():
        expert, rank = np.argwhere(held_ER > 1)[0]
        broken.append(f"rank {rank} holds expert {expert} twice")
    ranks_E = (held_ER > 0).sum(axis=1)
    if (ranks_E == 0).any():
        broken.append(f"expert {int(ranks_E.argmin())} has no slot")
    elif statement.survive:
        nodes_E = sum((held_ER[:, statement.node_R == n] > 0).any(axis=1) for n in range(statement.num_nodes))
        most = min(statement.survive + 1, statement.num_nodes)
        weak = (ranks_E <= statement.survive) | (nodes_E < most)
        if weak.any():
            broken.append(f"expert {int(weak.argmax())} does not survive {statement.survive} lost ranks")
    return broken


def _broken_capacity(statement: Statement, slots_LS: np.ndarray, slots_R: np.ndarray, rank_S: np.ndarray) -> list[str]:
    if not statement.shared_slots:
        same = np.array_equal(slots_R, statement.slots_R)
        return [] if same else [f"slots per rank {slots_R.tolist()}, allowed {statement.slots_R.tolist()}"]
    held_R = np.bincount(rank_S, (slots_LS >= 0).sum(axis=0), minlength=len(slots_R))
    over_R = held_R > len(slots_LS) * statement.slots_R
    return [f"rank {int(over_R.argmax())} holds more experts over all layers than its share"] if over_R.any() else []


def broken_caps(statement: Statement, imbalance_L: np.ndarray) -> list[str]:
    """Layers above the cap that the statement holds them to."""
    if statement.caps_L is None:
        return []
    over = np.flatnonzero(imbalance_L > statement.caps_L + ROUNDING)
    return [f"MoE layer {x}: imbalance {imbalance_L[x]:.6f}, held to {statement.caps_L[x]:.6f}" for x in over]


def fetched(slots_LS: np.ndarray, rank_S: np.ndarray, old_LS: np.ndarray, old_rank_S: np.ndarray) -> np.ndarray:
    """(L,) experts of each layer that ranks hold and did not hold before."""
    moves = []
    for row_S, old_S in zip(slots_LS, old_LS, strict=True):
        now = {(int(e), int(r)) for e, r in zip(row_S, rank_S, strict=True) if e >= 0}
        then = {(int(e), int(r)) for e, r in zip(old_S, old_rank_S, strict=True) if e >= 0}
        moves.append(len(now - then))
    return np.array(moves)
