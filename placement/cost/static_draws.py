"""StaticDraws: the slot that each rank sends an expert's tokens to under SGLang's static dispatch.

The slot of the rank itself; else the first one of its node, where the node has some and others have some too; else a
fair draw among all slots for all ranks in want of one. Every rank draws for itself, from the same seed, and draws only
for experts that it has no near slot of.

SGLang draws with Python's `random`. All ranks read one sequence of words, that of the seed, and differ in how far they
have come; so ranks at one place that want the same experts draw once for all, and a place is all that a rank's state
is. `shuffle` and `sample` are those of CPython (Fisher-Yates from the end; words with too large a head are passed by).

Shape letters: R ranks, E experts, S slots, J slots of one expert.
"""

import math
import random

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT
from moeplace.profiling.kernel_cache import njit

SGLANG_SEED = 42
"""With which SGLang draws where no slot is near."""
_WORD = 32


class StaticDraws:
    """The slots of one layer after another: a rank draws on where it stopped in the layer before."""

    def __init__(self, rank_of_slot: np.ndarray, node_of_rank: np.ndarray) -> None:
        self._rank_S, self._node_R = rank_of_slot, node_of_rank
        self._place_R = np.zeros(len(node_of_rank), np.int64)
        self._words = _Words()

    def next_layer(self, slots_S: np.ndarray, num_experts: int) -> np.ndarray:
        """(R, E) slot that each rank sends an expert's tokens to, -1 = the expert has none."""
        slots_E = slots_of_experts(slots_S, num_experts)
        table_RE = np.full((len(self._node_R), num_experts), -1, np.int64)
        for expert, slots in enumerate(slots_E):
            table_RE[:, expert] = slots[0] if len(slots) == 1 else -1
            if len(slots) > 1:
                table_RE[:, expert] = self._near_slots(np.array(slots))
        wanting_RE = (table_RE < 0) & np.array([bool(slots) for slots in slots_E])
        alike: dict[tuple[int, bytes], list[int]] = {}
        for rank, place in enumerate(self._place_R.tolist()):
            alike.setdefault((place, wanting_RE[rank].tobytes()), []).append(rank)
        for (place, _), ranks in alike.items():
            for expert in np.flatnonzero(wanting_RE[ranks[0]]).tolist():
                wanting = np.flatnonzero(wanting_RE[:, expert])
                choices, place = self._words.fair_choices(np.array(slots_E[expert]), len(wanting), place)
                table_RE[ranks, expert] = choices[np.searchsorted(wanting, ranks)]
            self._place_R[ranks] = place
        return table_RE

    def try_layer(self, slots_S: np.ndarray, num_experts: int) -> np.ndarray:
        """What `next_layer` would say, with nothing drawn."""
        before_R = self._place_R.copy()
        table_RE = self.next_layer(slots_S, num_experts)
        self._place_R = before_R
        return table_RE

    def _near_slots(self, slots_J: np.ndarray) -> np.ndarray:
        """(R,) slot of an expert that is near enough not to be drawn for, -1 = none."""
        rank_J, ranks = self._rank_S[slots_J], np.arange(len(self._node_R))
        mate_RJ = self._node_R[rank_J] == self._node_R[:, None]
        own_RJ = rank_J == ranks[:, None]
        some_R = mate_RJ.any(axis=1) & ~mate_RJ.all(axis=1)
        near_R = np.where(some_R, slots_J[mate_RJ.argmax(axis=1)], -1)
        return np.where(own_RJ.any(axis=1), slots_J[own_RJ.argmax(axis=1)], near_R)


def slots_of_experts(slots_S: np.ndarray, num_experts: int) -> list[list[int]]:
    """[expert] slots of a layer, rising."""
    slots_E: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(slots_S.tolist()):
        if expert != EMPTY_SLOT:
            slots_E[expert].append(slot)
    return slots_E


class _Words:
    """The words that `random.Random(SGLANG_SEED)` gives, as many as were asked for so far."""

    def __init__(self) -> None:
        _, (*key, position), _ = random.Random(SGLANG_SEED).getstate()
        self._source = np.random.MT19937()
        self._source.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": position}}
        self._known = np.empty(0, np.uint32)

    def fair_choices(self, slots_J: np.ndarray, count: int, place: int) -> tuple[np.ndarray, int]:
        """(`count` slots in random order, each as often as any other, as far as that divides; the place after them)."""
        whole, rest = divmod(count, len(slots_J))
        pool_size = 21 + (4 ** math.ceil(math.log(rest * 3, 4)) if rest > 5 else 0)  # as CPython's `sample` has it
        while True:
            chosen = np.concatenate([np.tile(slots_J, whole), np.empty(rest, slots_J.dtype)])
            end = _choose_fairly(slots_J.copy(), rest, len(slots_J) <= pool_size, self._known, place, chosen)
            if end >= 0:
                return chosen, int(end)
            more = self._source.random_raw(max(len(self._known), 1 << 14)).astype(np.uint32)
            self._known = np.concatenate([self._known, more])


@njit(cache=True, nogil=True)
def _draw_below(n, words, place):  # type: ignore[no-untyped-def]
    """(a number below n, the next place); (0, beyond all words) where they are too few."""
    bits = 0
    while n >> bits:
        bits += 1
    while place < len(words):
        drawn = np.int64(words[place]) >> (_WORD - bits)
        place += 1
        if drawn < n:
            return drawn, place
    return np.int64(0), len(words) + 1


@njit(cache=True, nogil=True)
def _choose_fairly(slots_J, rest, is_pool, words, place, chosen):  # type: ignore[no-untyped-def]
    """Fill the last `rest` of `chosen` with a sample, then shuffle all; the place after that, -1 = too few words."""
    total, count = len(slots_J), len(chosen)
    taken_J = np.zeros(total, np.bool_)
    for i in range(rest):
        if is_pool:
            j, place = _draw_below(total - i, words, place)
            chosen[count - rest + i] = slots_J[j]
            slots_J[j] = slots_J[total - i - 1]
        else:
            j, place = _draw_below(total, words, place)
            while taken_J[j] and place <= len(words):
                j, place = _draw_below(total, words, place)
            taken_J[j] = True
            chosen[count - rest + i] = slots_J[j]
    for i in range(count - 1, 0, -1):
        j, place = _draw_below(i + 1, words, place)
        chosen[i], chosen[j] = chosen[j], chosen[i]
    return place if place <= len(words) else -1
