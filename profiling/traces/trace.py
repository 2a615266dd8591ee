"""RoutingTrace: which experts every token was routed to, in every MoE layer.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import CHUNK_TOKENS, chunks, thread_pool, workers
from moeplace.profiling.traces.kernels import find_bad_assignment

NO_EXPERT = -1
"""Entry of `topk_ids` where a token has fewer than K experts (ragged top-k)."""

BASE_MODEL = -1
"""Entry of `adapter` where a token was served without one."""

Split = Literal["all", "train", "test"]
Tag = Literal["workload", "adapter"]

MOST_EXPERTS = 1 << 20
"""Per layer; a greater number is a damaged file."""

_BAD_ID, _TWICE = 1, 2
_CHECKED_AT_ONCE = 1 << 17


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing decisions of a model over a corpus.

    Attributes:
        topk_ids: (T, L, K) integers, sorted by falling gate weight, so slot 0 is the primary expert; -1 = no expert.
            An id in `[E_l, E_l + null_experts)` is a null or zero-computation expert: recorded, never dispatched.
        experts_per_layer: (L,) int64, real experts of each MoE layer; layers may differ.
        topk_weights: (T, L, K) floating gate weights, or None.
        sequence_ids: (T,) integers; tokens of one sequence are in order, and a split never cuts a sequence.
        positions: (T,) integers, position of the token in its sequence, or None.
        is_decode: (T,) bool, True where the token was generated rather than prefilled, or None.
        workload: (T,) integers, index into `workload_names`, or None.
        workload_names: tags of the workloads, for example tasks.
        model: name of the model.
        layer_ids: (L,) int64, decoder-layer index of each MoE layer, rising; dense layers between are normal.
        num_hidden_layers: decoder layers in all, dense ones included.
        expert_bytes: (L, E) int64 bytes of each expert's weights, or None when unknown.
        hidden_size: hidden size D of the model, 0 when unknown.
        kv_dim: K/V elements of a token and decoder layer, 0 when unknown.
        shared_experts: shared experts of an MoE layer, which need no placement.
        null_experts: number of null experts per layer.
        notes: remarks on how the trace came to be, such as "pseudo-sequences of 128 tokens".
        adapter: (T,) integers, index into `adapter_names` of the adapter that served the token, -1 = the base model; or
            None. Adapters share the experts of the base unless `separate_adapters` tells them apart.
        adapter_names: names of the adapters.

    Raises:
        InputError: shapes disagree, an id is out of range, or a token has an expert twice in one layer.
    """

    topk_ids: np.ndarray
    experts_per_layer: np.ndarray
    topk_weights: np.ndarray | None = None
    sequence_ids: np.ndarray | None = None
    positions: np.ndarray | None = None
    is_decode: np.ndarray | None = None
    workload: np.ndarray | None = None
    workload_names: tuple[str, ...] = ()
    model: str = ""
    layer_ids: np.ndarray | None = None
    num_hidden_layers: int = 0
    expert_bytes: np.ndarray | None = None
    hidden_size: int = 0
    null_experts: int = 0
    notes: tuple[str, ...] = ()
    adapter: np.ndarray | None = None
    adapter_names: tuple[str, ...] = ()
    kv_dim: int = 0
    shared_experts: int = 0
    validate: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        ids = np.asarray(self.topk_ids)
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"topk_ids must be integers of shape (tokens, layers, top-k), not {ids.dtype} {ids.shape}")
        tokens, layers, top_k = ids.shape
        if layers < 1 or top_k < 1:
            raise InputError(f"topk_ids of shape {ids.shape} must have at least one layer and one expert per token")
        experts = np.asarray(self.experts_per_layer, dtype=np.int64)
        if experts.shape != (layers,) or (experts < 1).any() or (experts > MOST_EXPERTS).any():
            raise InputError(f"experts_per_layer must be {layers} numbers in 1..{MOST_EXPERTS}, not {experts.tolist()}")
        layer_ids = np.arange(layers) if self.layer_ids is None else np.asarray(self.layer_ids, dtype=np.int64)
        if layer_ids.shape != (layers,) or (np.diff(layer_ids) <= 0).any() or layer_ids[0] < 0:
            raise InputError(f"layer_ids must be {layers} rising decoder-layer indices, not {layer_ids.tolist()}")
        hidden_layers = self.num_hidden_layers or int(layer_ids[-1]) + 1
        if hidden_layers <= layer_ids[-1]:
            raise InputError(f"num_hidden_layers ({hidden_layers}) must exceed the last MoE layer ({layer_ids[-1]})")
        per_expert = None if self.expert_bytes is None else _expert_bytes(self.expert_bytes, experts)
        for name, shape in (("topk_weights", ids.shape), *((n, (tokens,)) for n in _PER_TOKEN)):
            array = getattr(self, name)
            if array is not None and np.shape(array) != shape:
                raise InputError(f"{name} must have the shape {shape} that topk_ids implies, not {np.shape(array)}")
        for tag, least in (("workload", 0), ("adapter", BASE_MODEL)):
            self._check_tags(tag, least)
        if self.validate:
            _check_ids(ids, experts + self.null_experts)
        set_field = object.__setattr__
        set_field(self, "topk_ids", _read_only(ids))
        set_field(self, "experts_per_layer", _read_only(experts))
        set_field(self, "layer_ids", _read_only(layer_ids))
        set_field(self, "num_hidden_layers", hidden_layers)
        set_field(self, "expert_bytes", None if per_expert is None else _read_only(per_expert))
        for name in ("topk_weights", *_PER_TOKEN):
            array = getattr(self, name)
            if array is not None:
                set_field(self, name, _read_only(np.asarray(array)))

    def _check_tags(self, tag: str, least: int) -> None:
        index_T, names = getattr(self, tag), getattr(self, f"{tag}_names")
        if index_T is None or not len(index_T):
            return
        low, high = int(np.min(index_T)), int(np.max(index_T))
        if low < least or high >= max(len(names), least + 1):
            raise InputError(f"{tag} index {low if low < least else high} needs {least}..{len(names) - 1}")

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def num_layers(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[2]

    @property
    def num_experts(self) -> int:
        """E: the most experts any layer has."""
        return int(self.experts_per_layer.max())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def layer(self, index: int) -> np.ndarray:
        """(T, K) int16 or int32 contiguous ids of one MoE layer, null experts as -1: what dispatch sees."""
        dtype = np.int16 if self.num_experts < 2**15 else np.int32
        ids_TK = np.array(self.topk_ids[:, index], dtype=dtype, order="C")  # a copy, even of a trace of one layer
        if self.null_experts:
            ids_TK[ids_TK >= self.experts_per_layer[index]] = NO_EXPERT
        return ids_TK

    def select(self, tokens: np.ndarray | slice) -> Self:
        """The trace of some of its tokens (a boolean mask, indices or a slice), in their order."""
        changes: dict[str, Any] = {"topk_ids": self.topk_ids[tokens], "validate": False}
        for name in ("topk_weights", *_PER_TOKEN):
            array = getattr(self, name)
            changes[name] = None if array is None else array[tokens]
        return replace(self, **changes)

    def split(self, side: Split) -> Self:
        """One side of the split by sequence: even `sequence_ids` are train, odd ones test.

        Raises:
            InputError: the trace has no sequence ids, or one of the sides would be empty.
        """
        if side == "all":
            return self
        if self.sequence_ids is None:
            raise InputError("the trace has no sequence_ids, so it cannot be split by sequence; use the whole of it")
        odd_T = self.sequence_ids % 2 == 1
        if odd_T.all() or not odd_T.any():
            raise InputError("all sequence_ids are of one parity, so one side of the split by sequence is empty")
        return self.select(odd_T if side == "test" else ~odd_T)

    def hold_out(self, name: str, *, by: Tag = "workload") -> tuple[Self, Self]:
        """(train, test): all other workloads (or adapters), and the named one.

        Raises:
            InputError: the trace has no such tag, or no other.
        """
        index_T, names = getattr(self, by), getattr(self, f"{by}_names")
        if index_T is None or name not in names:
            raise InputError(f"{by} {name!r} is not among the trace's {list(names)}")
        held_T = index_T == names.index(name)
        if held_T.all() or not held_T.any():
            raise InputError(f"holding out {by} {name!r} leaves one side without tokens")
        return self.select(~held_T), self.select(held_T)

    def primary(self) -> Self:
        """The trace with each token's primary expert only (K = 1)."""
        return self.truncate(1)

    def truncate(self, top_k: int) -> Self:
        """The trace with the first `top_k` experts of every token.

        Raises:
            InputError: `top_k` is not in 1..K.
        """
        if not 1 <= top_k <= self.top_k:
            raise InputError(f"top-k ({top_k}) must lie in 1..{self.top_k}, the trace's own")
        weights = None if self.topk_weights is None else self.topk_weights[:, :, :top_k]
        return replace(self, topk_ids=self.topk_ids[:, :, :top_k], topk_weights=weights, validate=False)

    def equals(self, other: "RoutingTrace") -> bool:
        """Whether both hold the same decisions and metadata."""
        arrays = ("topk_ids", "experts_per_layer", "layer_ids", "topk_weights", "expert_bytes", *_PER_TOKEN)
        plain = (
            "workload_names",
            "adapter_names",
            "model",
            "num_hidden_layers",
            "hidden_size",
            "kv_dim",
            "shared_experts",
            "null_experts",
            "notes",
        )
        return all(_same(getattr(self, name), getattr(other, name)) for name in arrays) and all(
            getattr(self, name) == getattr(other, name) for name in plain
        )


_PER_TOKEN = ("sequence_ids", "positions", "is_decode", "workload", "adapter")


def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Traces of one model, one after another; sequence ids are renumbered so that sequences stay apart.

    Raises:
        InputError: the traces are not of one model shape.
    """
    first = traces[0]
    for other in traces[1:]:
        if other.topk_ids.shape[1:] != first.topk_ids.shape[1:] or not _same(
            other.experts_per_layer, first.experts_per_layer
        ):
            raise InputError(
                f"traces of different shapes cannot be joined: (layers, top-k) {first.topk_ids.shape[1:]} "
                f"and {other.topk_ids.shape[1:]}"
            )
    changes: dict[str, Any] = {"topk_ids": np.concatenate([t.topk_ids for t in traces]), "validate": False}
    if all(t.sequence_ids is not None for t in traces):
        parts, start = [], 0
        for trace in traces:
            parts.append(np.asarray(trace.sequence_ids, dtype=np.int64) + start)
            start = int(parts[-1].max()) + 1 if len(parts[-1]) else start
            start += start % 2  # keep the parity of every sequence, hence its side of the split
        changes["sequence_ids"] = np.concatenate(parts)
    else:
        changes["sequence_ids"] = None
    for name in ("topk_weights", "positions", "is_decode"):
        arrays = [getattr(t, name) for t in traces]
        changes[name] = None if any(a is None for a in arrays) else np.concatenate(arrays)
    for tag in ("workload", "adapter"):
        names = tuple(dict.fromkeys(name for t in traces for name in getattr(t, f"{tag}_names")))
        known = all(getattr(t, tag) is not None for t in traces)
        changes[tag] = np.concatenate([_renumbered(t, tag, names) for t in traces]) if known else None
        changes[f"{tag}_names"] = names if known else ()
    changes["notes"] = tuple(dict.fromkeys(note for t in traces for note in t.notes))
    return replace(first, **changes)


def _renumbered(trace: RoutingTrace, tag: str, names: tuple[str, ...]) -> np.ndarray:
    """(T,) index into `names` instead of the trace's own; -1 stays."""
    own = [names.index(name) for name in getattr(trace, f"{tag}_names")]
    return np.array([*own, -1], dtype=np.int32)[getattr(trace, tag)]


def _check_ids(ids_TLK: np.ndarray, limit_L: np.ndarray) -> None:
    start = 0
    for piece in chunks(ids_TLK, _CHECKED_AT_ONCE):
        parts = np.array_split(piece, workers(len(piece) // CHUNK_TOKENS + 1))
        if len(parts) == 1:  # a step or a small piece: starting threads would cost more than the check
            findings = [find_bad_assignment(piece, limit_L)]
        else:
            with thread_pool(len(parts)) as pool:
                findings = list(pool.map(find_bad_assignment, parts, [limit_L] * len(parts)))
        for part, finding in zip(parts, findings, strict=True):
            _raise_bad(finding, part, limit_L, start)
            start += len(part)


def _raise_bad(finding: tuple[int, int, int, int], ids_TLK: np.ndarray, limit_L: np.ndarray, start: int) -> None:
    kind, token, layer, slot = finding
    if kind == _BAD_ID:
        raise InputError(
            f"expert id {ids_TLK[token, layer, slot]} of token {start + token} in MoE layer {layer} "
            f"must lie in 0..{limit_L[layer] - 1}, or be -1 for none"
        )
    if kind == _TWICE:
        raise InputError(
            f"token {start + token} has expert {ids_TLK[token, layer, slot]} twice in MoE layer {layer}; "
            "the experts of a token must differ"
        )


def _expert_bytes(values: Any, experts_L: np.ndarray) -> np.ndarray:
    """(L, E) int64 from a scalar, (L,) or (L, E)."""
    array = np.asarray(values)
    shape = (len(experts_L), int(experts_L.max()))
    if array.ndim == 1:
        array = array[:, None]
    try:
        per_expert = np.array(np.broadcast_to(array, shape), dtype=np.int64)
    except ValueError as error:
        raise InputError(f"expert_bytes of shape {array.shape} must broadcast to (layers, experts) {shape}") from error
    if (per_expert < 0).any():
        raise InputError(f"expert_bytes must not be negative, the least is {per_expert.min()}")
    return per_expert


def _read_only(array: np.ndarray) -> np.ndarray:
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
