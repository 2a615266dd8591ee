"""Tokens of a source become a trace: surveyed, mended, in canonical order.

Shape letters: T tokens, t tokens of a piece, L layers of the source, E experts per layer, K top-k.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moeplace.profiling.errors import InputError
from moeplace.profiling.imports.canonical.findings import Findings, share
from moeplace.profiling.imports.canonical.imported import Imported
from moeplace.profiling.imports.canonical.kernels import mend_rows
from moeplace.profiling.imports.canonical.options import ImportOptions
from moeplace.profiling.imports.canonical.repair import Repair, find_repair
from moeplace.profiling.imports.canonical.rows import canonical_rows
from moeplace.profiling.imports.canonical.survey import (
    FILLS,
    Piece,
    Survey,
    as_ids,
    blank_tokens,
    cut,
    survey_pieces,
    tokens_of_set,
)
from moeplace.profiling.imports.canonical.suspicions import report_use
from moeplace.profiling.parallel import CHUNK_TOKENS
from moeplace.profiling.traces.file import TraceWriter
from moeplace.profiling.traces.trace import MOST_EXPERTS


@dataclass(frozen=True)
class TraceOutline:
    """What a source says of itself beside its tokens.

    Attributes:
        num_layers: layers of its arrays.
        top_k: columns of its arrays.
        num_experts: experts per layer, None = not said.
        layer_ids: decoder layer of each of its layers, None = not said.
        decoder_rows: its layers are all decoder layers, dense ones with id 0 throughout.
        weighted: it has gate weights.
        workload_names: of the tags of its pieces.
        adapter_names: likewise.
    """

    num_layers: int
    top_k: int
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    decoder_rows: bool = False
    weighted: bool = False
    workload_names: tuple[str, ...] = ()
    adapter_names: tuple[str, ...] = ()


def write_trace(
    out: str | Path,
    outline: TraceOutline,
    pieces: Callable[[], Iterable[Piece]],
    options: ImportOptions,
    findings: Findings,
) -> Imported:
    """Write the tokens of a source as a trace.

    Args:
        out: trace file.
        outline: what the source says of itself.
        pieces: reads the source from its start; called twice.
        options: what the user knows.
        findings: gets a sentence for everything that looks wrong.

    Raises:
        InputError: an option contradicts the source, or the pieces break a rule of `RoutingTrace`.
        FormatError: data looks wrong and `options.strict` holds.
    """
    survey = survey_pieces(_cleared(pieces(), options), outline.num_layers, outline.top_k)
    repair = find_repair(survey, options, findings, decoder_rows=outline.decoder_rows, weighted=outline.weighted)
    experts_L = _experts(survey, repair, outline, options, findings)
    report_use(survey.counts_LM[repair.kept], experts_L, findings, complete=survey.counts_LM.shape[1] > 1)
    top_k = options.top_k or repair.top_k
    if top_k > repair.top_k:
        raise InputError(f"top-k ({top_k}) must lie in 1..{repair.top_k}, that of the source")
    layer_ids, hidden_layers = _layers(repair, outline, options)
    metadata = {
        "model": options.model,
        "layer_ids": layer_ids,
        "num_hidden_layers": hidden_layers,
        "expert_bytes": options.expert_bytes,
        "hidden_size": options.hidden_size,
        "kv_dim": options.kv_dim,
        "shared_experts": options.shared_experts,
        "null_experts": options.null_experts,
        "workload_names": outline.workload_names,
        "adapter_names": outline.adapter_names,
        "notes": tuple(findings.notes),
    }
    bar = tqdm(total=survey.tokens, unit="token", desc="import", disable=not options.progress)
    with TraceWriter(out, experts_per_layer=experts_L, top_k=top_k, **metadata) as writer, bar:
        for piece in cut(_cleared(pieces(), options), CHUNK_TOKENS):
            bar.update(len(piece["topk_ids"]))
            _append(writer, piece, repair, top_k)
        tokens = writer.num_tokens
    ids = np.arange(len(repair.kept)) if layer_ids is None else layer_ids
    return Imported(
        Path(out), "trace", tokens, len(repair.kept), int(experts_L.max()), top_k, tuple(findings.notes),
        experts_per_layer=tuple(experts_L.tolist()), layer_ids=tuple(ids.tolist()),
        num_hidden_layers=writer.num_hidden_layers, dropped=tuple(findings.dropped), remarks=tuple(findings.remarks),
    )  # fmt: skip


def _cleared(pieces: Iterable[Piece], options: ImportOptions) -> Iterator[Piece]:
    """The pieces with the user's fill value as -1."""
    for piece in pieces:
        ids = piece["topk_ids"]
        if options.fill_value is not None:
            piece["topk_ids"] = np.where(ids == options.fill_value, -1, ids.astype(np.int64, copy=False))
        if len(ids):
            yield piece


def _append(writer: TraceWriter, piece: Piece, repair: Repair, top_k: int) -> None:
    """Mend a piece and write what is left of it."""
    ids_tLK, weights_tLK = as_ids(piece.pop("topk_ids")[:, repair.kept]), piece.pop("topk_weights", None)
    if weights_tLK is not None:
        weights_tLK = weights_tLK[:, repair.kept]
        nulls_tLK = (ids_tLK == 0) & (weights_tLK == 0) & repair.mending.zero_means_none_L[:, None]
        ids_tLK[nulls_tLK] = -1
    mend_rows(ids_tLK, repair.mending)
    keep_t = ~blank_tokens(ids_tLK)
    if repair.padding:
        keep_t &= ~tokens_of_set(ids_tLK, repair.padding)
    if not keep_t.all():
        ids_tLK = ids_tLK[keep_t]
        weights_tLK = None if weights_tLK is None else weights_tLK[keep_t]
        piece = {name: array[keep_t] for name, array in piece.items()}
    ids_tLK, weights_tLK = canonical_rows(ids_tLK, weights_tLK)
    weights_tLK = None if weights_tLK is None else weights_tLK[:, :, :top_k]
    writer.append(ids_tLK[:, :, :top_k], topk_weights=weights_tLK, **piece)


def _layers(repair: Repair, outline: TraceOutline, options: ImportOptions) -> tuple[np.ndarray | None, int]:
    """(decoder layers of the MoE layers or None, decoder layers in all or 0): as the user or the source says."""
    own = None if outline.layer_ids is None else np.array(outline.layer_ids)
    hidden_layers = options.num_hidden_layers
    if own is None and (outline.decoder_rows or len(repair.kept) < outline.num_layers):
        own = np.arange(outline.num_layers)
        if options.layer_ids is None:
            hidden_layers = hidden_layers or outline.num_layers
    return options.layer_ids_of(own, outline.num_layers, repair.kept), hidden_layers


def _experts(
    survey: Survey, repair: Repair, outline: TraceOutline, options: ImportOptions, findings: Findings
) -> np.ndarray:
    """(L',) experts of each MoE layer: as the user or the source says, else the greatest id + 1.

    Raises:
        InputError: both say something else, or an id is too great.
    """
    greatest_L = _greatest(survey, repair)
    given = options.experts_of_layers(outline.num_layers, repair.kept)
    if outline.num_experts is not None:
        if given is not None and (given != outline.num_experts).any():
            raise InputError(
                f"num-experts ({int(given[given != outline.num_experts][0])}) must be {outline.num_experts}, "
                f"that of {findings.source}"
            )
        given = np.full(len(repair.kept), outline.num_experts)
    if given is None:
        return np.full(len(repair.kept), expert_count(int(greatest_L.max()), options, findings))
    over_L = greatest_L >= given + options.null_experts
    if over_L.any():
        layer = int(over_L.argmax())
        _refuse_beyond(survey.counts_LM[repair.kept], given + options.null_experts, layer, greatest_L, findings)
    return given


def _greatest(survey: Survey, repair: Repair) -> np.ndarray:
    """(L',) greatest id that means an expert."""
    tallies = survey.tallies
    greatest_L = tallies.greatest_L[repair.kept].copy()
    for value, columns_K in zip(FILLS.tolist(), tallies.fill_columns_FK, strict=True):
        if value in repair.mending.fills or not columns_K.any():
            continue
        if value < survey.counts_LM.shape[1]:
            greatest_L[survey.counts_LM[repair.kept, value] > 0] = np.maximum(
                greatest_L[survey.counts_LM[repair.kept, value] > 0], value
            )
        else:
            greatest_L[:] = np.maximum(greatest_L, value)
    return greatest_L


def _refuse_beyond(
    counts_LM: np.ndarray, limit_L: np.ndarray, layer: int, greatest_L: np.ndarray, findings: Findings
) -> None:
    beyond = sum(int(row[limit:].sum()) for row, limit in zip(counts_LM, limit_L.tolist(), strict=True))
    limit, greatest = int(limit_L[layer]), int(greatest_L[layer])
    part = f", as {share(beyond, int(counts_LM.sum()))} of all ids do not" if beyond else ""
    raise InputError(
        f"{findings.source}: expert id {greatest} in MoE layer {layer} must lie in 0..{limit - 1}{part}: "
        f"if ids {limit}..{greatest} are zero-computation experts give --null-experts {greatest + 1 - limit}, "
        "if they mark no expert give --fill-value"
    )


def expert_count(greatest_id: int, options: ImportOptions, findings: Findings) -> int:
    """Experts per layer from the greatest id, with a warning where that looks like too few or too many.

    Raises:
        InputError: an id is too great, or all would be null experts.
    """
    if greatest_id >= MOST_EXPERTS:
        raise InputError(f"{findings.source}: expert id {greatest_id} must be below {MOST_EXPERTS}")
    count = greatest_id + 1 - options.null_experts
    if count < 1:
        raise InputError(f"null-experts ({options.null_experts}) must be fewer than the {greatest_id + 1} ids in use")
    if count & (count - 1):
        findings.warn(
            f"{count} experts per layer assumed from the greatest id: give --num-experts if there are more, and "
            "--null-experts if some of them are zero-computation experts"
        )
    return count
