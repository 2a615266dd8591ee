"""Seats: a row of slots as items that change ranks, and back.

An item is a slot of a row with what it holds, or with nothing: a *blank*, which ends up as one more slot for an expert
of its rank, because engines take no empty slot. An expert twice on a rank is served there as if it were there once.

Shape letters: E experts, R ranks, I items = S slots per layer.
"""

import numpy as np

BLANK = -1


def kept_items(row_S: np.ndarray, most_E: np.ndarray) -> np.ndarray:
    """(I,) expert of each item: the row, with at most so many slots of each expert, those of the first ranks."""
    items_I, seen_E = row_S.astype(np.int64), np.zeros(len(most_E), np.int64)
    for item, expert in enumerate(items_I.tolist()):
        seen_E[expert] += 1
        if seen_E[expert] > most_E[expert]:
            items_I[item] = BLANK
    return items_I


def needed_slots(load_E: np.ndarray, count_E: np.ndarray, most: float) -> np.ndarray:
    """(E,) slots of each expert, of those it has, such that none takes more than `most` load; at least one."""
    return np.minimum(np.maximum(np.ceil(load_E / most), 1.0), count_E).astype(np.int64)


def row_of(expert_I: np.ndarray, rank_I: np.ndarray, near_S: np.ndarray, ranks: int) -> np.ndarray | None:
    """(S,) slots that hold these items on these ranks; None where a rank would hold blanks alone, or must break a rule.

    What a slot of `near_S` holds stays in that slot wherever its rank still has it. A blank repeats an expert that has
    no slot on another rank: a rule that draws among slots would send a repeated one more than its share.
    """
    per_rank, count_E = len(near_S) // ranks, np.bincount(expert_I[expert_I >= 0])
    row_S = np.full(len(near_S), BLANK, np.int32)
    for rank in range(ranks):
        here = expert_I[rank_I == rank]
        left = here[here >= 0].tolist()
        repeatable = [expert for expert in left if count_E[expert] == left.count(expert)]
        slots = range(rank * per_rank, (rank + 1) * per_rank)
        if len(left) < per_rank and not repeatable:
            return None
        for slot in slots:
            if near_S[slot] in left:
                row_S[slot] = near_S[slot]
                left.remove(near_S[slot])
        empty = [slot for slot in slots if row_S[slot] < 0]
        # The last ones of the slots that are left keep what they hold, if it may be repeated.
        empty.sort(key=lambda slot: near_S[slot] in repeatable)
        for slot, expert in zip(empty, left, strict=False):
            row_S[slot] = expert
        for number, slot in enumerate(empty[len(left) :]):
            stays = near_S[slot] in repeatable
            row_S[slot] = near_S[slot] if stays else repeatable[number % len(repeatable)]
    return row_S
