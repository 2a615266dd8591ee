"""SGLang expert-distribution dumps (`.pt`): stat and stat_approx, per_pass, per_token.

Rows of the arrays are decoder layers, dense ones included (zero counts or -1 ids). Ids are physical slots, mapped to
experts by the file's last map. Shape letters: T tokens, L MoE layers, E experts, S slots; L* all decoder layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.containers.torch_archive import StoredTensor, read_torch_archive
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.canonical import (
    MOST_LAYERS,
    Findings,
    Imported,
    ImportOptions,
    Piece,
    TraceOutline,
    write_load,
    write_trace,
)
from moeplace.profiling.imports.files import sources_in
from moeplace.profiling.imports.json_lines import is_json
from moeplace.profiling.imports.loads import import_load, is_table
from moeplace.profiling.imports.routed_experts import has_requests, import_sglang_requests
from moeplace.profiling.imports.tables.table import CountTable
from moeplace.profiling.traces.trace import MOST_EXPERTS

_EXTEND, _DECODE, _IDLE = 1, 2, 4
_WORKLOADS = ("sequences", "pseudo-sequences")
_DOMINANT = 0.5

_NOTE_MAP = "slots converted to experts by the map valid at the dump: wrong if experts were re-placed while recording"
_NOTE_ORDER = "no gate weights in the source: the first expert of a token need not have the greatest weight"
_NOTE_PSEUDO = "decode passes and continued prefills cannot be linked: one pseudo-sequence per pass and rank"


def import_sglang(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read a dump file, a folder with the dumps of all ranks, answers with routed experts, or a table of counts.

    Raises:
        InputError: there is no such file, or its contents break a rule.
        FormatError: it is not such a dump.
    """
    if is_table(source):
        return import_load(source, out, options)
    if is_json(source):
        requests = has_requests(source) or Path(source).suffix != ".json"
        return (import_sglang_requests if requests else import_load)(source, out, options)
    if Path(source).is_file() and not _is_dump(Path(source)):
        return import_load(source, out, options)
    dumps = [_read_dump(path) for path in sources_in(source, "*.pt")]
    kinds = {dump.kind for dump in dumps}
    if len(kinds) > 1:
        raise FormatError(f"{source} mixes dumps of modes {', '.join(sorted(kinds))}: import them one by one")
    if kinds == {"per_token"}:
        return _import_tokens(source, out, dumps, options)
    return _import_counts(source, out, dumps, options)


@dataclass(frozen=True)
class _Dump:
    """One file: its mode, its arrays or records, and its map (L*, S) from slot to expert."""

    path: Path
    kind: str
    counts: tuple[np.ndarray, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    slot_to_expert: np.ndarray | None = None


def _is_dump(path: Path) -> bool:
    """Whether a file is a recorder's; a bare tensor and the like are not."""
    if path.suffix not in (".pt", ".pth"):
        return False
    document = read_torch_archive(path)
    return isinstance(document, dict) and bool({"logical_count", "records"} & set(document))


def _read_dump(path: Path) -> _Dump:
    document = read_torch_archive(path)
    if not isinstance(document, dict):
        raise FormatError(f"{path} is not an SGLang dump: it holds a {type(document).__name__}")
    if "logical_count" in document:
        return _Dump(path, "stat", counts=(_counts(path, document["logical_count"]),))
    records, mapped = document.get("records"), document.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or mapped is None:
        raise FormatError(f"{path} is not an SGLang dump: it has neither logical_count nor records")
    slot_to_expert = _counts(path, mapped)
    if slot_to_expert.ndim != 2 or slot_to_expert.min() < 0 or slot_to_expert.max() >= MOST_EXPERTS:
        raise FormatError(f"{path}: last_physical_to_logical_map is not a map of slots to experts")
    if any("topk_ids_of_layer" in record for record in records):
        return _Dump(path, "per_token", records=tuple(records), slot_to_expert=slot_to_expert)
    counts = tuple(_counts(path, record.get("global_physical_count")) for record in records)
    return _Dump(path, "per_pass", counts=counts, slot_to_expert=slot_to_expert)


def _counts(path: Path, value: Any) -> np.ndarray:
    """An integer array of two or three axes with a sane number of layers."""
    array = value.read() if isinstance(value, StoredTensor) else np.zeros(0)
    if array.ndim not in (2, 3) or array.dtype.kind not in "iu" or not array.size or array.shape[-2] > MOST_LAYERS:
        raise FormatError(f"{path}: an array of counts or slots is missing, or not integers by layer and expert")
    return array


def _import_counts(source: str | Path, out: str | Path, dumps: list[_Dump], options: ImportOptions) -> Imported:
    """Sum over steps (a rotated ring buffer: its axis is not time), passes and ranks; zero rows are dense layers."""
    sums = [_expert_counts(dump) for dump in dumps if dump.counts]
    if not sums or len({total.shape for total in sums}) > 1:
        shapes = ", ".join(str(total.shape) for total in sums) or "none"
        raise FormatError(f"{source}: dumps of one model must have counts of one shape, not {shapes}")
    load = np.sum(sums, axis=0)
    if not load.any():
        raise InputError(f"{source}: all counts are zero, nothing was recorded")
    findings = Findings(source, strict=options.strict)
    findings.note(_NOTE_MAP)
    return write_load(out, CountTable(tuple(load), num_hidden_layers=len(load)), options, findings)


def _expert_counts(dump: _Dump) -> np.ndarray:
    """(L*, E) int64 counts of one file."""
    total = np.zeros(dump.counts[0].shape[-2:], dtype=np.int64)
    for counts in dump.counts:
        steps = counts if counts.ndim == 3 else counts[None]
        if steps.shape[1:] != total.shape:
            raise FormatError(
                f"{dump.path}: counts of shape {steps.shape[1:]} and {total.shape} do not belong together"
            )
        for step in steps:
            total += step
    if dump.slot_to_expert is None:
        return total
    if dump.slot_to_expert.shape != total.shape:
        raise FormatError(f"{dump.path}: counts of {total.shape} do not fit a map of {dump.slot_to_expert.shape}")
    load = np.zeros((len(total), int(dump.slot_to_expert.max()) + 1), dtype=np.int64)
    np.add.at(load, (np.arange(len(total))[:, None], dump.slot_to_expert), total)
    return load


def _import_tokens(source: str | Path, out: str | Path, dumps: list[_Dump], options: ImportOptions) -> Imported:
    first = dumps[0].slot_to_expert
    assert first is not None
    for dump in dumps[1:]:
        if not np.array_equal(np.asarray(dump.slot_to_expert), first):
            raise FormatError(
                f"{dump.path} has another slot map than {dumps[0].path}: experts were re-placed meanwhile"
            )
    records = [(rank, record) for rank, dump in enumerate(dumps) for record in _ordered(dump)]
    width, zero_share = _judge(dumps, records, len(first))
    findings = Findings(source, strict=options.strict)
    for note in (_NOTE_MAP, _NOTE_ORDER, _NOTE_PSEUDO):
        findings.note(note)
    if zero_share > _DOMINANT and first.max() > 1:
        findings.warn(f"slot 0 has {zero_share:.0%} of all assignments: padded rows may be among them")
    outline = TraceOutline(
        len(first), width, num_experts=int(first.max()) + 1, decoder_rows=True, workload_names=_WORKLOADS
    )
    return write_trace(out, outline, lambda: _pieces(dumps, records, first, width), options, findings)


def _ordered(dump: _Dump) -> list[dict[str, Any]]:
    """Records by forward pass; passes without tokens are left out."""
    for record in dump.records:
        numbers = [record.get("forward_pass_id"), record.get("forward_mode")]
        lists = [record.get("input_ids"), record.get("positions")]
        if not all(type(n) is int for n in numbers) or not all(_is_ints(values) for values in lists):
            raise FormatError(f"{dump.path}: a record lacks forward_pass_id, forward_mode, input_ids or positions")
    tokens = [r for r in dump.records if r["forward_mode"] != _IDLE and len(_ints(r["input_ids"]))]
    return sorted(tokens, key=lambda record: record["forward_pass_id"])


def _is_ints(value: Any) -> bool:
    if isinstance(value, StoredTensor):
        return len(value.shape) == 1 and value.dtype.kind in "iu"
    return isinstance(value, list) and all(type(n) is int and -(2**62) < n < 2**62 for n in value)


def _ints(value: Any) -> np.ndarray:
    return value.read() if isinstance(value, StoredTensor) else np.asarray(value, dtype=np.int64)


def _slots(path: Path, record: dict[str, Any], layers: int) -> np.ndarray:
    """(L*, tokens, width) physical ids of a record, cut to its tokens (some back ends pad)."""
    tensor = record.get("topk_ids_of_layer")
    slots = tensor.read() if isinstance(tensor, StoredTensor) else np.zeros(0)
    tokens = len(_ints(record["input_ids"]))
    if slots.ndim != 3 or slots.dtype.kind != "i" or slots.shape[0] != layers or slots.shape[1] < tokens:
        raise FormatError(
            f"{path}: topk_ids_of_layer of a record must be integers (layers {layers}, tokens {tokens}, k)"
        )
    if len(_ints(record["positions"])) < tokens:
        raise FormatError(f"{path}: a record of {tokens} tokens has fewer positions")
    return slots[:, :tokens]


def _judge(dumps: list[_Dump], records: list[tuple[int, dict[str, Any]]], layers: int) -> tuple[int, float]:
    """(columns, share of slot 0) over all records; -1 fills the rest."""
    width, zeros, total = 1, 0, 0
    for rank, record in records:
        dump = dumps[rank]
        assert dump.slot_to_expert is not None
        slots = _slots(dump.path, record, layers)
        if slots.size and (slots.min() < -1 or slots.max() >= dump.slot_to_expert.shape[1]):
            raise FormatError(f"{dump.path}: a physical id lies outside the {dump.slot_to_expert.shape[1]} slots")
        width = max(width, slots.shape[2])
        zeros, total = zeros + int((slots == 0).sum()), total + int((slots >= 0).sum())
    if not total or width > 1024:
        raise InputError(f"{dumps[0].path}: no record holds a token with an expert")
    return width, zeros / total


def _pieces(
    dumps: list[_Dump],
    records: list[tuple[int, dict[str, Any]]],
    slot_to_expert: np.ndarray,
    width: int,
) -> Iterator[Piece]:
    """One piece per record; a record that another rank has too (same pass, tokens, positions) is taken once."""
    seen: set[tuple[int, bytes, bytes]] = set()
    sequence = 0
    layers = len(slot_to_expert)
    rows = np.arange(layers)[None, :, None]
    with_none = np.pad(slot_to_expert, ((0, 0), (0, 1)), constant_values=-1)  # slot -1 -> -1
    for rank, record in records:
        slots = _slots(dumps[rank].path, record, layers)
        tokens = slots.shape[1]
        inputs, positions = _ints(record["input_ids"])[:tokens], _ints(record["positions"])[:tokens]
        key = (record["forward_pass_id"], inputs.tobytes(), positions.tobytes())
        if key in seen:
            continue
        seen.add(key)
        slots_TLK = slots.transpose(1, 0, 2)
        lengths = _lengths(record, tokens)
        linked = record["forward_mode"] == _EXTEND and bool(lengths)
        ids_T = np.full(tokens, sequence)
        pseudo_T = np.ones(tokens, dtype=np.int64)
        following = sequence + 1
        start = 0
        for length in lengths if linked else ():
            if positions[start] == 0:
                ids_T[start : start + length] = following
                pseudo_T[start : start + length] = 0
                following += 1
            start += length
        sequence = following
        yield {
            "topk_ids": np.pad(
                with_none[rows, slots_TLK], ((0, 0), (0, 0), (0, width - slots_TLK.shape[2])), constant_values=-1
            ),
            "sequence_ids": ids_T,
            "positions": positions,
            "is_decode": np.full(tokens, record["forward_mode"] == _DECODE),
            "workload": pseudo_T,
        }


def _lengths(record: dict[str, Any], tokens: int) -> list[int]:
    """Lengths of the sequences of a prefill pass, or nothing where they do not add up."""
    value = record.get("extend_seq_lens")
    if value is None or not _is_ints(value):
        return []
    lengths = _ints(value).tolist()
    return lengths if all(n > 0 for n in lengths) and sum(lengths) == tokens else []
