"""Who serves an expert with several slots, token by token, by each rule; written from the rules' text alone.

Shape letters: T tokens, E experts, K top-k, R ranks.
"""

import random
from collections.abc import Callable

import numpy as np

_ORDERS = 4096
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)

Serve = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(layer, (T, K) ids, (T,) rank where each token is or -1) -> (T, K) serving rank, -1 where there is no expert."""


def server(rule: str, slots_LS: np.ndarray, rank_S: np.ndarray, node_R: np.ndarray, experts: int) -> Serve:
    """The rule of that name on one placement.

    Args:
        rule: "moeplace", "nearest-static", "random" or "hash".
        slots_LS: (L, S) expert in each slot, -1 = empty.
        rank_S: (S,) rank of each slot.
        node_R: (R,) node of each rank.
        experts: E.
    """
    held_LER = np.zeros((len(slots_LS), experts, len(node_R)), bool)
    for layer, slot in np.argwhere(slots_LS >= 0):
        held_LER[layer, slots_LS[layer, slot], rank_S[slot]] = True
    if not (held_LER.sum(axis=2) > 1).any():
        return lambda layer, ids_TK, near_T: np.where(ids_TK >= 0, held_LER[layer].argmax(axis=1)[ids_TK], -1)
    if rule == "moeplace":
        return lambda layer, ids_TK, near_T: _cover(ids_TK, held_LER[layer], node_R, near_T)
    if rule == "nearest-static":
        table_RLE = _static_ranks(slots_LS, rank_S, node_R, experts)
        return lambda layer, ids_TK, near_T: _by_asking(table_RLE[:, layer], ids_TK, near_T)
    return lambda layer, ids_TK, near_T: _by_number(rule, layer, ids_TK, slots_LS[layer], rank_S, len(node_R))


def _order_rows(ranks: int, rows: np.ndarray) -> np.ndarray:
    """(T, R) place of each rank in the order that each row number prefers ranks in."""
    first_T1: np.ndarray = (rows // 2)[:, None].astype(np.uint64) * np.uint64(ranks)
    key_TR: np.ndarray = first_T1 + np.arange(1, ranks + 1, dtype=np.uint64)
    for multiplier in _MIX:
        key_TR = (key_TR ^ (key_TR >> np.uint64(33))) * np.uint64(multiplier)
    key_TR = key_TR ^ (key_TR >> np.uint64(33))
    place_TR = np.argsort(np.argsort(key_TR, axis=1, kind="stable"), axis=1, kind="stable")
    return np.where((rows % 2 == 1)[:, None], ranks - 1 - place_TR, place_TR)


def _cover(ids_TK: np.ndarray, held_ER: np.ndarray, node_R: np.ndarray, near_T: np.ndarray) -> np.ndarray:
    """Experts with one slot there; others where the token goes anyhow; then by the rank that holds most of the rest."""
    ranks = held_ER.shape[1]
    single_E, first_E = held_ER.sum(axis=1) == 1, held_ER.argmax(axis=1)
    rank_TK = np.where((ids_TK >= 0) & single_E[ids_TK], first_E[ids_TK], -1)
    held_TKR = held_ER[ids_TK] & ((ids_TK >= 0) & (rank_TK < 0))[:, :, None]
    open_T = np.flatnonzero(held_TKR.any(axis=(1, 2)))
    held_TKR, near, index = held_TKR[open_T], near_T[open_T], np.arange(len(open_T))
    place_TR = _order_rows(ranks, np.arange(_ORDERS))[open_T % _ORDERS]
    used_TR = (rank_TK[open_T][:, :, None] == np.arange(ranks)).any(axis=1)
    near_TR = near[:, None] == np.arange(ranks)
    forced_TKR = held_TKR & used_TR[:, None, :]
    score_TKR = forced_TKR * (1 + (ranks - place_TR)[:, None, :] + 2 * ranks * near_TR[:, None, :])
    chosen_TK = np.where(forced_TKR.any(axis=2), score_TKR.argmax(axis=2), rank_TK[open_T])
    held_TKR &= ~forced_TKR.any(axis=2)[:, :, None]
    same_RR = node_R[:, None] == node_R[None, :]
    while held_TKR.any():
        near_node_TR = ((used_TR | near_TR)[:, :, None] & same_RR).any(axis=1)
        wanted_TR = held_TKR.sum(axis=1)
        score_TR = (4 * wanted_TR + 2 * near_TR + near_node_TR) * ranks + (ranks - 1 - place_TR)
        best_T = np.where(wanted_TR > 0, score_TR, -1).argmax(axis=1)
        unfinished_T = wanted_TR.any(axis=1)
        used_TR[index[unfinished_T], best_T[unfinished_T]] = True
        taken_TK = held_TKR[index, :, best_T]
        chosen_TK = np.where(taken_TK, best_T[:, None], chosen_TK)
        held_TKR &= ~taken_TK[:, :, None]
    rank_TK[open_T] = chosen_TK
    return rank_TK


def _by_asking(table_RE: np.ndarray, ids_TK: np.ndarray, near_T: np.ndarray) -> np.ndarray:
    asks_T = np.where(near_T >= 0, near_T, np.arange(len(ids_TK)) % len(table_RE))
    return np.where(ids_TK >= 0, table_RE[asks_T[:, None], ids_TK], -1)


def _by_number(
    rule: str, layer: int, ids_TK: np.ndarray, row_S: np.ndarray, rank_S: np.ndarray, ranks: int
) -> np.ndarray:
    """ "hash": by Knuth's hash of the token's row on its home rank; "random": by a draw; slots in rising order."""
    slots = [np.flatnonzero(row_S == expert) for expert in range(int(row_S.max()) + 1)]
    count_TK = np.array([max(len(s), 1) for s in slots])[ids_TK]
    if rule == "hash":
        number_TK = ((np.arange(len(ids_TK)) // ranks * 2654435769) % 2**32)[:, None] % count_TK
    else:
        number_TK = (np.random.default_rng((42, layer)).random(ids_TK.shape) * count_TK).astype(np.int64)
    width = max(len(s) for s in slots)
    rank_EJ = np.array([np.pad(rank_S[s], (0, width - len(s)), constant_values=-1) for s in slots])
    return np.where(ids_TK >= 0, rank_EJ[ids_TK, number_TK], -1)


def _static_ranks(slots_LS: np.ndarray, rank_S: np.ndarray, node_R: np.ndarray, experts: int) -> np.ndarray:
    """(R, L, E) rank that each rank sends an expert's tokens to under SGLang's static dispatch, -1 = no such expert."""
    table_RLE = np.full((len(node_R), len(slots_LS), experts), -1, np.int64)
    for me in range(len(node_R)):
        draw = random.Random(42)
        for layer, row_S in enumerate(slots_LS):
            for expert in range(experts):
                slots = np.flatnonzero(row_S == expert).tolist()
                if slots:
                    table_RLE[me, layer, expert] = rank_S[_static_slot(slots, me, rank_S, node_R, draw)]
    return table_RLE


def _static_slot(slots: list[int], me: int, rank_S: np.ndarray, node_R: np.ndarray, draw: random.Random) -> int:
    near = _near(slots, me, rank_S, node_R)
    if near >= 0:
        return near
    wanting = [rank for rank in range(len(node_R)) if _near(slots, rank, rank_S, node_R) < 0]
    whole, rest = divmod(len(wanting), len(slots))
    drawn = slots * whole + draw.sample(slots, k=rest)
    draw.shuffle(drawn)
    return drawn[wanting.index(me)]


def _near(slots: list[int], rank: int, rank_S: np.ndarray, node_R: np.ndarray) -> int:
    if len(slots) == 1:
        return slots[0]
    own = [slot for slot in slots if rank_S[slot] == rank]
    mates = [slot for slot in slots if node_R[rank_S[slot]] == node_R[rank]]
    if own:
        return own[0]
    return mates[0] if 0 < len(mates) < len(slots) else -1
