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


def server(rule: str, slots_LS: np.ndarray, rank_S: np.ndarray, node_R: np.ndarray, experts: int, batch: int) -> Serve:
    """The rule of that name on one placement.

    Args:
        rule: "moeplace", "balanced", "nearest-static", "random" or "hash".
        slots_LS: (L, S) expert in each slot, -1 = empty.
        rank_S: (S,) rank of each slot.
        node_R: (R,) node of each rank.
        experts: E.
        batch: tokens of a step.
    """
    held_LER = np.zeros((len(slots_LS), experts, len(node_R)), bool)
    for layer, slot in np.argwhere(slots_LS >= 0):
        held_LER[layer, slots_LS[layer, slot], rank_S[slot]] = True
    if not (held_LER.sum(axis=2) > 1).any():
        return lambda layer, ids_TK, near_T: np.where(ids_TK >= 0, held_LER[layer].argmax(axis=1)[ids_TK], -1)
    if rule == "moeplace":
        return lambda layer, ids_TK, near_T: _cover(ids_TK, held_LER[layer], node_R, near_T)
    if rule == "balanced":
        return lambda layer, ids_TK, near_T: _by_load_so_far(ids_TK, held_LER[layer], node_R, near_T, batch)
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


def _by_load_so_far(
    ids_TK: np.ndarray, held_ER: np.ndarray, node_R: np.ndarray, near_T: np.ndarray, batch: int
) -> np.ndarray:
    """ "balanced": step by step, all homes of a step at once, each with what it has sent so far."""
    tokens, ranks = len(ids_TK), len(node_R)
    width = min(batch, tokens)
    length = tokens // width
    in_steps = np.arange(width * length).reshape(width, length)
    steps = [*in_steps.T, np.arange(width * length, tokens)]
    home_T = np.where(near_T >= 0, near_T, np.arange(tokens) % ranks)
    sent_HR, chosen_TK = np.zeros((ranks, ranks), np.int64), np.full(ids_TK.shape, -1)
    for index in steps:
        if len(index):
            chosen_TK[index] = _one_step(ids_TK[index], held_ER, node_R, near_T[index], home_T[index], sent_HR)
    return chosen_TK


def _one_step(
    ids_BK: np.ndarray,
    held_ER: np.ndarray,
    node_R: np.ndarray,
    near_B: np.ndarray,
    home_B: np.ndarray,
    sent_HR: np.ndarray,
) -> np.ndarray:
    """(B, K) serving ranks; adds to what homes have sent."""
    top_k, ranks, rows = ids_BK.shape[1], len(node_R), np.arange(len(ids_BK))
    exists_BK, copies_E = ids_BK >= 0, held_ER.sum(axis=1)
    held_BKR = held_ER[ids_BK] & exists_BK[:, :, None]
    single_BK = exists_BK & (copies_E[ids_BK] == 1)
    used_BR = (held_BKR & single_BK[:, :, None]).any(axis=1)
    fixed_HR, shared_H = np.zeros((ranks, ranks), np.int64), np.zeros(ranks, np.int64)
    np.add.at(fixed_HR, home_B, (held_BKR & single_BK[:, :, None]).sum(axis=1))
    np.add.at(shared_H, home_B, (exists_BK & ~single_BK).sum(axis=1))
    known_BR = (sent_HR + 256 * fixed_HR)[home_B]
    share_B = -(-256 * shared_H[home_B] // ranks)
    near_BR, same_RR = near_B[:, None] == np.arange(ranks), node_R[:, None] == node_R[None, :]
    for joined in range(top_k):
        open_BKR = held_BKR & ~(held_BKR & used_BR[:, None, :]).any(axis=2, keepdims=True)
        wanted_BR = open_BKR.sum(axis=1)
        if not wanted_BR.any():
            break
        in_use_BR = ((used_BR | near_BR)[:, :, None] & same_RR).any(axis=1)
        score_BR = np.where(wanted_BR > 0, 4 * wanted_BR + 2 * near_BR + in_use_BR, -1)
        tied_BR = (score_BR == score_BR.max(axis=1, keepdims=True)) & (wanted_BR > 0)
        draw_B = rows * 2 * top_k + top_k + joined
        used_BR[rows, _drawn(tied_BR, known_BR, share_B, draw_B)] |= tied_BR.any(axis=1)
    chosen_BK = np.where(single_BK, held_BKR.argmax(axis=2), -1)
    for k in range(top_k):
        drawn_B = _drawn(held_BKR[:, k] & used_BR, known_BR, share_B, rows * 2 * top_k + k)
        chosen_BK[:, k] = np.where(exists_BK[:, k] & ~single_BK[:, k], drawn_B, chosen_BK[:, k])
    token, place = np.nonzero(exists_BK)
    np.add.at(sent_HR, (home_B[token], chosen_BK[token, place]), 256)
    tokens_H = np.bincount(home_B[exists_BK.any(axis=1)], minlength=ranks)
    sent_HR[:] = sent_HR * 4096 // (4096 + tokens_H)[:, None]
    return chosen_BK


def _drawn(tied_BR: np.ndarray, known_BR: np.ndarray, share_B: np.ndarray, draw_B: np.ndarray) -> np.ndarray:
    """(B,) the tied rank on which the draw falls, each as wide as its room; any where none is tied."""
    count_B1 = tied_BR.sum(axis=1, keepdims=True)
    mean_B1 = (known_BR * tied_BR).sum(axis=1, keepdims=True)
    room_BR = np.maximum(count_B1 * (share_B[:, None] - known_BR) + mean_B1, 0) * tied_BR
    ends_BR = room_BR.cumsum(axis=1)
    place_B1 = (draw_B * 2654435769 % 2**32 // 2**16)[:, None] * ends_BR[:, -1:]
    found: np.ndarray = (ends_BR * 2**16 > place_B1).argmax(axis=1)
    return found
