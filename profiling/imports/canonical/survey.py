"""A first reading of a source of tokens: which ids there are, in which layers, and which tokens look empty or padded.

Shape letters: T tokens, t tokens of a piece, L layers of the source (dense ones included), K top-k, M ids counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moeplace.profiling.imports.canonical.kernels import Tallies, survey_rows

Piece = dict[str, np.ndarray]
"""Arguments of `TraceWriter.append`: `topk_ids` (t, L, K) and its optional companions."""

FILLS = np.array([127, 255, 32767, 65535, 2**31 - 1], dtype=np.int64)
"""Greatest numbers of the integer types: what buffers are filled with."""
_MOST_COUNTED = 1 << 22
_MOST_SETS = 1 << 14


@dataclass
class Survey:
    """What a source holds.

    Attributes:
        tallies: sums over its rows.
        counts_LM: (L, M) how many tokens chose each id below M.
        tokens: T.
        blank: tokens without an expert in any layer.
        alike: how many tokens have one set of experts in all layers, by set (the most frequent ones).
    """

    tallies: Tallies
    counts_LM: np.ndarray
    tokens: int = 0
    blank: int = 0
    alike: Counter[tuple[int, ...]] = field(default_factory=Counter)

    @classmethod
    def empty(cls, layers: int, top_k: int) -> "Survey":
        """Of a source without tokens."""
        tallies = Tallies(
            constant_L=np.zeros(layers, np.int64),
            none_L=np.zeros(layers, np.int64),
            zeros_L=np.zeros(layers, np.int64),
            single_zero_L=np.zeros(layers, np.int64),
            twice_L=np.zeros(layers, np.int64),
            greatest_L=np.full(layers, -1, np.int64),
            widest_L=np.zeros(layers, np.int64),
            fill_columns_FK=np.zeros((len(FILLS), top_k), np.int64),
            fill_twice_F=np.zeros(len(FILLS), np.int64),
            least=np.zeros(1, np.int64),
        )
        return cls(tallies, np.zeros((layers, 1), np.int64))

    def add(self, ids_tLK: np.ndarray) -> None:
        """Count a piece."""
        self._widen(_greatest_below(ids_tLK, int(FILLS[-1])))
        tokens = len(ids_tLK)
        blank_t, alike_t = np.zeros(tokens, bool), np.full(tokens, -1, np.int64)
        survey_rows(ids_tLK, FILLS, self.tallies, self.counts_LM, blank_t, alike_t)
        self.tokens += tokens
        self.blank += int(blank_t.sum())
        for index in np.flatnonzero(alike_t >= 0).tolist():
            key = tuple(sorted(e for e in ids_tLK[index, alike_t[index]].tolist() if e >= 0))
            if key in self.alike or len(self.alike) < _MOST_SETS:
                self.alike[key] += 1

    def _widen(self, greatest: int) -> None:
        layers, counted = self.counts_LM.shape
        if greatest >= counted and layers * (greatest + 1) <= _MOST_COUNTED:
            self.counts_LM = np.pad(self.counts_LM, ((0, 0), (0, greatest + 1 - counted)))


def _greatest_below(ids: np.ndarray, limit: int) -> int:
    greatest = int(ids.max(initial=0))
    return greatest if greatest < limit else int(ids[ids < limit].max(initial=0))


def survey_pieces(pieces: Iterable[Piece], layers: int, top_k: int) -> Survey:
    """Read all pieces of a source once."""
    survey = Survey.empty(layers, top_k)
    for piece in pieces:
        survey.add(as_ids(piece["topk_ids"]))
    return survey


def as_ids(ids: np.ndarray) -> np.ndarray:
    """A contiguous copy in int32, which the kernels are compiled for and may change; greater ids become its limit."""
    if ids.dtype.itemsize > 4 or ids.dtype == np.uint32:
        ids = np.minimum(ids, 2**31 - 1)
    return np.array(ids, dtype=np.int32, order="C")


def blank_tokens(ids_tLK: np.ndarray) -> np.ndarray:
    """(t,) bool: no layer has an expert (of mended ids)."""
    return np.asarray((ids_tLK < 0).all(axis=(1, 2)))


def tokens_of_set(ids_tLK: np.ndarray, experts: tuple[int, ...]) -> np.ndarray:
    """(t,) bool: all layers with an expert have just these."""
    wanted = np.array([-1] * (ids_tLK.shape[2] - len(experts)) + list(experts))
    match_tL = (np.sort(ids_tLK, axis=2) == wanted).all(axis=2)
    return np.asarray((match_tL | (ids_tLK < 0).all(axis=2)).all(axis=1) & match_tL.any(axis=1))


def cut(pieces: Iterable[Piece], size: int) -> Iterator[Piece]:
    """The same tokens in pieces of at most `size`."""
    for piece in pieces:
        for start in range(0, len(piece["topk_ids"]), size):
            yield {name: array[start : start + size] for name, array in piece.items()}
