"""Recent routing of a serving engine, with the rows of each token put together again.

A rank sees the ids of the tokens that are with it in a layer, and in `coherent` mode a token may be with another rank
in the next layer. So every row carries the number of its pass and of its token in the pass's batch, which all ranks
know alike; the rows of all ranks then join to whole tokens, and these to a routing trace.

Shape letters: T tokens, L MoE layers, K top-k, M rows that one rank saw in one layer.
"""

import io
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from moeplace.profiling.containers.npz import DAMAGE
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.trace import RoutingTrace

_TOKEN_BITS = 32
_ARRAYS = ("rows_of_layer", "keys", "ids", "batch_keys", "batch_sequences")


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """What one rank saw of some passes.

    Attributes:
        rows_of_layer: (L,) int64 rows of each layer.
        keys: (sum of M,) int64, pass number and token number of every row, layer after layer.
        ids: (sum of M, K) int16 or int32 expert ids, -1 = none.
        batch_keys: (T,) int64 keys of all tokens of those passes, on every rank alike.
        batch_sequences: (T,) int64 number of each one's sequence.
    """

    rows_of_layer: np.ndarray
    keys: np.ndarray
    ids: np.ndarray
    batch_keys: np.ndarray
    batch_sequences: np.ndarray

    def to_bytes(self) -> bytes:
        """For the wire: an `.npz` archive."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in _ARRAYS})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """As `to_bytes` gave it.

        Raises:
            FormatError: it is something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                return cls(**{name: archive[name] for name in _ARRAYS})
        except DAMAGE as error:
            raise FormatError(f"{len(content)} bytes are not routed rows: {error}") from error

    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(keys (M,), ids (M, K)) of every layer."""
        edges = np.cumsum(self.rows_of_layer)[:-1]
        return list(zip(np.split(self.keys, edges), np.split(self.ids, edges), strict=True))


@dataclass
class _Pass:
    number: int
    sequences_T: np.ndarray
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)  # per layer: (token, ids)


class RecentRows:
    """Keeps the rows of the last passes of one rank. Nothing is joined before it is asked for.

    All ranks must begin the same passes, so that they keep and drop the same ones.

    Attributes:
        keep: tokens of all ranks to keep; whole passes, the last one in any case.
    """

    def __init__(self, num_layers: int, *, keep: int) -> None:
        self.keep = keep
        self._num_layers = num_layers
        self._passes: deque[_Pass] = deque()
        self._begun = self._tokens = 0

    def begin_pass(self, sequences: np.ndarray) -> None:
        """The next pass serves a batch of tokens (T,) of these sequences, token by token."""
        self._passes.append(_Pass(self._begun, sequences, [[] for _ in range(self._num_layers)]))
        self._begun += 1
        self._tokens += len(sequences)
        while len(self._passes) > 1 and self._tokens - len(self._passes[0].sequences_T) >= self.keep:
            self._tokens -= len(self._passes.popleft().sequences_T)

    def record(self, layer: int, ids: np.ndarray, token: np.ndarray) -> None:
        """Add the ids (M, K) of the tokens (M,) of the pass that are on this rank in `layer`.

        They are kept in the smallest type: thousands of passes may be.
        """
        if self._passes:  # rows outside a pass belong to no batch
            self._passes[-1].rows[layer].append((token.astype(np.int32), ids.astype(_id_type(ids))))

    def clear(self) -> None:
        """Forget all rows; passes are numbered on."""
        self._passes.clear()
        self._tokens = 0

    def restart(self) -> None:
        """Forget all rows and number passes from 0 again, on all ranks at the same step boundary."""
        self.clear()
        self._begun = 0

    def snapshot(self) -> RoutedRows:
        """What is kept now."""
        by_layer = [
            [(_keys(p.number, token), ids) for p in self._passes for token, ids in p.rows[layer]]
            for layer in range(self._num_layers)
        ]
        rows = [row for layer in by_layer for row in layer]
        top_k = max((ids.shape[1] for _, ids in rows), default=1)
        empty = [np.zeros(0, np.int64)]
        ids_MK = np.concatenate([np.zeros((0, top_k), np.int32)] + [ids.astype(np.int32) for _, ids in rows])
        return RoutedRows(
            np.array([sum(len(keys) for keys, _ in layer) for layer in by_layer], np.int64),
            np.concatenate(empty + [keys for keys, _ in rows]),
            ids_MK.astype(_id_type(ids_MK)),
            np.concatenate(empty + [_keys(p.number, np.arange(len(p.sequences_T))) for p in self._passes]),
            np.concatenate(empty + [np.asarray(p.sequences_T, np.int64) for p in self._passes]),
        )


def join_rows(parts: Sequence[RoutedRows], experts_per_layer: np.ndarray, **metadata: Any) -> RoutingTrace:
    """The tokens that the ranks saw together, sequence after sequence; those not seen in every layer are left out.

    Args:
        parts: one per rank, taken at the same step boundary.
        experts_per_layer: (L,) real experts of each MoE layer.
        **metadata: of the trace, such as `layer_ids` and `expert_bytes`.

    Raises:
        InputError: there is no part, or the parts are not of one model.
    """
    if not parts:
        raise InputError("routing of no rank cannot be joined, at least one part is needed")
    layers = len(experts_per_layer)
    for part in parts:
        if len(part.rows_of_layer) != layers:
            raise InputError(f"routed rows of {len(part.rows_of_layer)} layers do not belong to a model of {layers}")
    top_k = max(part.ids.shape[1] for part in parts)
    keys, sequences = parts[0].batch_keys, parts[0].batch_sequences
    columns = []
    for by_rank in zip(*(part.layers() for part in parts), strict=True):
        filled = [(keys, ids) for keys, ids in by_rank if len(keys)]
        seen = np.concatenate([np.zeros(0, np.int64), *(keys for keys, _ in filled)])
        ids_MK = np.concatenate([np.zeros((0, top_k), np.int32), *(ids for _, ids in filled)])
        order = np.argsort(seen, kind="stable")
        columns.append((seen[order], ids_MK[order]))
        keys = np.intersect1d(keys, seen)
    sequence_T = sequences[np.searchsorted(parts[0].batch_keys, keys)]
    ids_TLK = np.full((len(keys), layers, top_k), -1, np.int32)
    for layer, (seen, ids_MK) in enumerate(columns):
        if len(keys):
            ids_TLK[:, layer] = ids_MK[np.searchsorted(seen, keys)]
    order = np.lexsort((keys, sequence_T))
    return RoutingTrace(ids_TLK[order], experts_per_layer, sequence_ids=sequence_T[order], **metadata)


def _id_type(ids: np.ndarray) -> type[np.signedinteger[Any]]:
    return np.int16 if ids.max(initial=0) < 2**15 else np.int32


def _keys(number: int, token: np.ndarray) -> np.ndarray:
    return (np.int64(number) << _TOKEN_BITS) + np.asarray(token, np.int64)
