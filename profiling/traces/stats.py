"""RoutingStats: the counts of a routing trace that placement works from.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, U distinct k-sets.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import chunks, workers
from moeplace.profiling.traces.kernels import count_layers
from moeplace.profiling.traces.trace import NO_EXPERT, RoutingTrace

_MOST_TABLE_BYTES = 1 << 33


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Counts over the tokens of a trace, or sums of them; int64, float64 after `decayed`.

    Attributes:
        load: (L, E) token assignments of every expert; null experts are not counted.
        transitions: (L-1, E, E) tokens whose primary expert is i in layer l and j in layer l+1.
        coactivation: (L, E, E) tokens that experts e and f of one layer serve together, symmetric, zero diagonal.
        experts_per_layer: (L,) int64; rows and columns beyond a layer's own experts are zero.
        num_tokens: tokens counted; a decayed window has a fraction of a token.
    """

    load: np.ndarray
    transitions: np.ndarray
    coactivation: np.ndarray
    experts_per_layer: np.ndarray
    num_tokens: float

    def __post_init__(self) -> None:
        experts = np.asarray(self.experts_per_layer, dtype=np.int64)
        layers, most = len(experts), int(experts.max())
        shapes = {
            "load": (layers, most),
            "transitions": (layers - 1, most, most),
            "coactivation": (layers, most, most),
            "experts_per_layer": (layers,),
        }
        for name, shape in shapes.items():
            array = np.asarray(getattr(self, name)).view()
            if array.shape != shape:
                raise InputError(f"{name} must have shape {shape} for {layers} layers of {most}, not {array.shape}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def from_trace(cls, trace: RoutingTrace, *, threads: int | None = None) -> Self:
        """Count a trace in one pass; memory is that of the tables, whatever the number of tokens."""
        return cls.from_ids(trace.topk_ids, trace.experts_per_layer, threads=threads)

    @classmethod
    def from_ids(cls, topk_ids: np.ndarray, experts_per_layer: np.ndarray, *, threads: int | None = None) -> Self:
        """Count the ids (T, L, K) of a trace or of one step; ids of null experts and -1 are skipped.

        Raises:
            InputError: the ids are not of shape (T, L, K) with L = len(experts_per_layer), or the tables would not fit.
        """
        experts_L = np.ascontiguousarray(experts_per_layer, dtype=np.int64)
        layers, most = len(experts_L), int(experts_L.max())
        if topk_ids.ndim != 3 or topk_ids.shape[1] != layers:
            raise InputError(f"topk_ids must have shape (tokens, {layers}, top-k), not {topk_ids.shape}")
        if 16 * layers * most**2 > _MOST_TABLE_BYTES:
            raise InputError(f"tables of {layers} layers x {most} x {most} experts need more than 8 GiB")
        load_LE = np.zeros((layers, most), dtype=np.int64)
        transitions_LEE = np.zeros((layers - 1, most, most), dtype=np.int64)
        pairs_LEE = np.zeros((layers, most, most), dtype=np.int64)
        parts = min(threads or workers(), layers)
        edges = [layers * part // parts for part in range(parts + 1)]

        def count(part: int, ids_TLK: np.ndarray) -> None:
            count_layers(ids_TLK, experts_L, edges[part], edges[part + 1], load_LE, transitions_LEE, pairs_LEE)

        with ThreadPoolExecutor(parts) as pool:
            for ids_TLK in chunks(topk_ids):
                list(pool.map(count, range(parts), [ids_TLK] * parts))
        for pairs_EE in pairs_LEE:
            pairs_EE += pairs_EE.T.copy()
        return cls(load_LE, transitions_LEE, pairs_LEE, experts_L, len(topk_ids))

    @classmethod
    def empty(cls, experts_per_layer: np.ndarray) -> Self:
        """Counts of no token: the start of a window."""
        return cls.from_ids(np.zeros((0, len(experts_per_layer), 1), np.int16), experts_per_layer, threads=1)

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """E: the most experts any layer has."""
        return int(self.experts_per_layer.max())

    def merge(self, other: "RoutingStats") -> Self:
        """The counts of both.

        Raises:
            InputError: they are not of one model shape.
        """
        if not np.array_equal(self.experts_per_layer, other.experts_per_layer):
            raise InputError(
                f"stats of {self.num_layers} layers x {self.num_experts} experts cannot be merged with "
                f"{other.num_layers} x {other.num_experts}"
            )
        return replace(
            self,
            load=self.load + other.load,
            transitions=self.transitions + other.transitions,
            coactivation=self.coactivation + other.coactivation,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def decayed(self, factor: float) -> Self:
        """All counts times `factor`, as float64: `window = window.decayed(f).merge(step)` is an exponential window.

        Raises:
            InputError: `factor` is not in 0..1.
        """
        if not 0 <= factor <= 1:
            raise InputError(f"decay factor ({factor}) must lie in 0..1")
        return replace(
            self,
            load=self.load * float(factor),
            transitions=self.transitions * float(factor),
            coactivation=self.coactivation * float(factor),
            num_tokens=self.num_tokens * float(factor),
        )

    def equals(self, other: "RoutingStats") -> bool:
        """Whether both hold the same counts."""
        names = ("load", "transitions", "coactivation", "experts_per_layer", "num_tokens")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


def distinct_ksets(ids_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct expert sets of one layer and how many tokens have each.

    Args:
        ids_TK: (T, K) integers, -1 = no expert, in any order inside a row.

    Returns:
        sets (U, K) of the dtype of `ids_TK`, each row rising with its -1 last, rows in lexicographic order (-1 counts
        as the greatest id); counts (U,) int64, which sum to T.
    """
    tokens = len(ids_TK)
    if not tokens:
        return ids_TK.copy(), np.zeros(0, dtype=np.int64)
    none = int(ids_TK.max()) + 1  # stands for -1 while sorting
    sorted_TK = np.sort(np.where(ids_TK == NO_EXPERT, none, ids_TK).astype(np.int64), axis=1)
    keys = _packed(sorted_TK, none)
    order = np.lexsort(keys[::-1]) if len(keys) > 1 else np.argsort(keys[0], kind="stable")
    new_T = np.ones(tokens, dtype=bool)
    new_T[1:] = np.logical_or.reduce([key[order[1:]] != key[order[:-1]] for key in keys])
    first = np.flatnonzero(new_T)
    sets_UK = sorted_TK[order[first]]
    sets_UK[sets_UK == none] = NO_EXPERT
    return sets_UK.astype(ids_TK.dtype), np.diff(np.append(first, tokens))


def _packed(sorted_TK: np.ndarray, largest: int) -> list[np.ndarray]:
    """Rows as few (T,) int64 words, most significant first, in the same lexicographic order."""
    bits = max(largest.bit_length(), 1)
    per_word = 63 // bits
    words = []
    for start in range(0, sorted_TK.shape[1], per_word):
        word = np.zeros(len(sorted_TK), dtype=np.int64)
        for column_T in sorted_TK[:, start : start + per_word].T:
            word = (word << bits) | column_T
        words.append(word)
    return words
