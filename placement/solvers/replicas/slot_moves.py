"""Moves of a replica search: two slots swap their experts, or a slot is re-pointed to another expert; and back.

Slot x on the rank of `bit_g` has expert a. With y < 0 it gets expert b, which has other slots; else it swaps with slot
y on the rank of `bit_h`, which has expert b (-1 = y is empty). mask_E (E,) are the ranks of each expert as bits,
copies_E (E,) its slots.
"""

from numba import njit


@njit(cache=True, nogil=True, inline="always")
def make_move(x, y, a, b, bit_g, bit_h, slots_S, mask_E, copies_E):  # type: ignore[no-untyped-def]
    """Carry a move out, in place."""
    slots_S[x] = b
    if y < 0:
        mask_E[a] &= ~bit_g
        mask_E[b] |= bit_g
        copies_E[a] -= 1
        copies_E[b] += 1
        return
    slots_S[y] = a
    mask_E[a] = (mask_E[a] & ~bit_g) | bit_h
    if b >= 0:
        mask_E[b] = (mask_E[b] & ~bit_h) | bit_g


@njit(cache=True, nogil=True, inline="always")
def take_back(x, y, a, b, old_a, old_b, slots_S, mask_E, copies_E):  # type: ignore[no-untyped-def]
    """Undo a move, in place; `old_a` and `old_b` are the masks from before."""
    mask_E[a] = old_a
    if b >= 0:
        mask_E[b] = old_b
    slots_S[x] = a
    if y < 0:
        copies_E[a] += 1
        copies_E[b] -= 1
    else:
        slots_S[y] = b
