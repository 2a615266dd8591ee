"""What every importer shares: options, canonical rows, and writing a trace or a load file.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import InputError, MoeplaceWarning
from moeplace.profiling.parallel import chunks
from moeplace.profiling.traces.file import TraceWriter
from moeplace.profiling.traces.kernels import sort_rows
from moeplace.profiling.traces.loads import WITHOUT_TOKENS, LoadStats, save_load
from moeplace.profiling.traces.trace import MOST_EXPERTS

PSEUDO_LENGTH = 128
"""Tokens of a pseudo-sequence where a source does not say which tokens belong together."""

MOST_LAYERS = 4096

Piece = dict[str, np.ndarray]
"""Arguments of `TraceWriter.append`: `topk_ids` (t, L, K) and its optional companions."""


@dataclass(frozen=True)
class ImportOptions:
    """What the user knows and a source may not say; zeros, blanks and None mean unknown.

    Attributes:
        top_k: keep the first `top_k` experts of every token.
        num_experts: experts per layer; by default the greatest id + 1.
        null_experts: ids `num_experts` .. `num_experts + null_experts - 1` are null experts.
        layer_ids: decoder-layer index of each MoE layer.
        num_hidden_layers: decoder layers in all.
        model: name of the model.
        expert_bytes: bytes of one expert's weights.
        hidden_size: hidden size of the model.
        workload_names: names of the workload tags.
        progress: show a progress bar on standard error.
    """

    top_k: int | None = None
    num_experts: int | None = None
    null_experts: int = 0
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int = 0
    model: str = ""
    expert_bytes: int | None = None
    hidden_size: int = 0
    workload_names: tuple[str, ...] = ()
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("num_experts", 1), ("null_experts", 0), ("expert_bytes", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} ({value}) must be at least {least}")
        if self.num_experts is not None and self.num_experts > MOST_EXPERTS:
            raise InputError(f"num-experts ({self.num_experts}) must be at most {MOST_EXPERTS}")


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        path: the file.
        kind: "trace", or "load" for loads without tokens.
        num_tokens: tokens of a trace; 0 for loads.
        num_layers: L.
        num_experts: E.
        top_k: K of a trace; 0 for loads.
        notes: remarks that the file carries too.
    """

    path: Path
    kind: str
    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        shape = f"{self.num_layers} layers x {self.num_experts} experts"
        if self.kind == "load":
            return f"{self.path}: loads of {shape} ({WITHOUT_TOKENS})"
        return f"{self.path}: {self.num_tokens} tokens x {shape}, top-{self.top_k}"


@dataclass
class TraceOutline:
    """What must be known of a trace before its first token is written."""

    experts_per_layer: np.ndarray
    top_k: int
    layer_ids: Sequence[int] | None = None
    num_hidden_layers: int = 0
    workload_names: tuple[str, ...] = ()
    adapter_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def write_trace(out: str | Path, outline: TraceOutline, pieces: Iterable[Piece], options: ImportOptions) -> Imported:
    """Write pieces as a trace: rows canonical (by falling weight, -1 last), cut to `options.top_k`.

    Raises:
        InputError: an option contradicts the source, or the pieces break a rule of `RoutingTrace`.
    """
    top_k = options.top_k or outline.top_k
    if top_k > outline.top_k:
        raise InputError(f"top-k ({top_k}) must lie in 1..{outline.top_k}, that of the source")
    layers = len(outline.experts_per_layer)
    layer_ids = options.layer_ids or outline.layer_ids
    if layer_ids is not None and len(layer_ids) != layers:
        raise InputError(f"layer-ids name {len(layer_ids)} layers, the source has {layers} MoE layers")
    metadata: dict[str, Any] = {
        "model": options.model,
        "layer_ids": None if layer_ids is None else np.asarray(layer_ids),
        "num_hidden_layers": options.num_hidden_layers or outline.num_hidden_layers,
        "expert_bytes": options.expert_bytes,
        "hidden_size": options.hidden_size,
        "null_experts": options.null_experts,
        "workload_names": outline.workload_names,
        "adapter_names": outline.adapter_names,
        "notes": tuple(outline.notes),
    }
    with TraceWriter(out, experts_per_layer=outline.experts_per_layer, top_k=top_k, **metadata) as writer:
        for piece in pieces:
            ids_TLK, weights_TLK = canonical_rows(piece.pop("topk_ids"), piece.pop("topk_weights", None))
            weights_TLK = None if weights_TLK is None else weights_TLK[:, :, :top_k]
            writer.append(ids_TLK[:, :, :top_k], topk_weights=weights_TLK, **piece)
        tokens = writer.num_tokens
    return Imported(
        Path(out), "trace", tokens, layers, int(outline.experts_per_layer.max()), top_k, tuple(outline.notes)
    )


def write_load(out: str | Path, load_LE: np.ndarray, options: ImportOptions, **known: Any) -> Imported:
    """Write loads (L, E) as a load file; `known` are fields of `LoadStats` that the source says.

    Raises:
        InputError: an option contradicts the source, or the loads break a rule of `LoadStats`.
    """
    layers, experts = load_LE.shape
    if options.num_experts is not None and options.num_experts != experts:
        raise InputError(f"num-experts ({options.num_experts}) must be {experts}, that of the source")
    if options.top_k is not None:
        raise InputError(f"top-k ({options.top_k}) cannot be applied: the source has loads, not tokens")
    layer_ids = options.layer_ids or known.pop("layer_ids", None)
    known.pop("layer_ids", None)
    if layer_ids is not None and len(layer_ids) != layers:
        raise InputError(f"layer-ids name {len(layer_ids)} layers, the source has {layers} MoE layers")
    hidden_layers = options.num_hidden_layers or known.pop("num_hidden_layers", 0)
    known.pop("num_hidden_layers", None)
    model = options.model or known.pop("model", "")
    known.pop("model", None)
    notes = tuple(known.pop("notes", ()))
    stats = LoadStats(
        load_LE,
        layer_ids=None if layer_ids is None else np.asarray(layer_ids),
        num_hidden_layers=hidden_layers,
        model=model,
        notes=notes,
    )
    save_load(out, stats)
    return Imported(Path(out), "load", 0, layers, experts, 0, notes)


def canonical_rows(ids_TLK: np.ndarray, weights_TLK: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows with -1 last and, where weights are given, by falling weight; ties keep their order. Copies.

    Raises:
        InputError: a weight is not a number.
    """
    dtype = ids_TLK.dtype if ids_TLK.dtype in (np.int16, np.int32) else np.int64
    ids = np.array(ids_TLK, dtype=dtype, order="C")
    if weights_TLK is None:
        sort_rows(ids.reshape(-1, ids.shape[2]), np.zeros((0, ids.shape[2]), np.float32))
        return ids, None
    weights = np.array(weights_TLK, dtype=np.float32, order="C")
    if np.isnan(weights).any():
        raise InputError("a gate weight is NaN; weights must be numbers")
    sort_rows(ids.reshape(-1, ids.shape[2]), weights.reshape(-1, ids.shape[2]))
    return ids, weights


def id_range(ids: np.ndarray) -> tuple[int, int]:
    """Least and greatest id of an integer array, (0, -1) when it is empty; memory-mapped arrays stay on disk."""
    low, high = 0, -1
    for number, piece in enumerate(chunks(ids)):
        if piece.size:
            least, most = int(piece.min()), int(piece.max())
            low, high = (least, most) if number == 0 else (min(low, least), max(high, most))
    return low, high


def expert_count(greatest_id: int, options: ImportOptions, notes: list[str]) -> int:
    """Experts per layer: as the user says, else the greatest id + 1, with a warning where that looks too few.

    Raises:
        InputError: no token has an expert, or an id is too great.
    """
    if options.num_experts is not None:
        return options.num_experts
    if greatest_id < 0:
        raise InputError("no token has an expert: all ids are -1")
    if greatest_id >= MOST_EXPERTS:
        raise InputError(f"expert id {greatest_id} must be below {MOST_EXPERTS}")
    count = greatest_id + 1 - options.null_experts
    if count < 1:
        raise InputError(f"null-experts ({options.null_experts}) must be fewer than the {greatest_id + 1} ids in use")
    if count % 8 and count & (count - 1):
        note = f"{count} experts per layer assumed from the greatest id, not a round number: give --num-experts if more"
        notes.append(note)
        warn(note)
    return count


def pseudo_sequences(num_tokens: int, notes: list[str]) -> np.ndarray:
    """(T,) sequence ids of consecutive pieces of 128 tokens, with a note and a warning."""
    note = f"no sequence ids in the source: pseudo-sequences of {PSEUDO_LENGTH} consecutive tokens"
    notes.append(note)
    warn(note)
    return np.arange(num_tokens) // PSEUDO_LENGTH


def sources_in(source: str | Path, pattern: str) -> list[Path]:
    """The files an import reads: `source` itself, or those of the folder `source` that match `pattern`, by name.

    Raises:
        InputError: there is nothing of the kind.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"no such file: {path}")
        return [path]
    found = sorted(path.glob(pattern))
    if not found:
        raise InputError(f"folder {path} has no file {pattern}")
    return found


def warn(text: str) -> None:
    """A MoeplaceWarning."""
    warnings.warn(text, MoeplaceWarning, stacklevel=3)
