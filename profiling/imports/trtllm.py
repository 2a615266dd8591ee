"""TensorRT-LLM expert statistics: a folder with meta_info.json and one safetensors file per rank.

`rank{r}.safetensors` has counts (E,) under "{iteration}_{layer}", to be summed over ranks; `rank{r}_raw.safetensors`
(or `token_selected_experts_rank{r}.safetensors`) the selected experts (tokens, K). Layers are decoder layers.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeplace.profiling.containers.safetensors_file import read_safetensors
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json
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
from moeplace.profiling.imports.tables.table import CountTable
from moeplace.profiling.traces.trace import MOST_EXPERTS

_COUNTS = re.compile(r"rank(\d{1,6})\.safetensors")
_RAW = re.compile(r"(?:rank(\d{1,6})_raw|token_selected_experts_rank(\d{1,6}))\.safetensors")
_KEY = re.compile(r"(\d{1,12})_(\d{1,6})")
_NOTE_PSEUDO = "no sequences in the source: one pseudo-sequence per iteration and rank"
_NOTE_ORDER = "no gate weights in the source: the first expert of a token need not have the greatest weight"

Grid = dict[tuple[int, int], np.ndarray]
"""(iteration, decoder layer) -> array."""


def import_trtllm(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read a statistics folder: a trace where raw files are present, loads otherwise.

    Raises:
        InputError: there is no such folder, or its contents break a rule.
        FormatError: a file is damaged, the grid of keys is incomplete, or raw and counts disagree.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{source} is not a folder: TensorRT-LLM statistics are a folder with meta_info.json")
    meta = read_json(folder / "meta_info.json")
    experts = meta.get("num_experts") if isinstance(meta, dict) else None
    if type(experts) is not int or not 1 <= experts <= MOST_EXPERTS:
        raise FormatError(f"{folder / 'meta_info.json'} has no num_experts in 1..{MOST_EXPERTS}")
    counts = _read_ranks(folder, _COUNTS)
    raw = _read_ranks(folder, _RAW)
    if raw:
        return _import_raw(folder, out, options, raw, counts, experts)
    if not counts:
        raise FormatError(f"folder {folder} has neither rank*.safetensors nor rank*_raw.safetensors")
    layers = _check_grid(folder, counts)
    load_LE = np.zeros((len(layers), experts), dtype=np.int64)
    for grid in counts.values():
        for (_, layer), array in grid.items():
            load_LE[layers.index(layer)] += _counts_of(folder, array, experts)
    table = CountTable(tuple(load_LE), tuple(layers))
    return write_load(out, table, options, Findings(source, strict=options.strict))


def _read_ranks(folder: Path, pattern: re.Pattern[str]) -> dict[int, Grid]:
    """rank -> its arrays, of the files whose whole name matches."""
    ranks: dict[int, Grid] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        grid: Grid = {}
        for name, array in read_safetensors(path).items():
            key = _KEY.fullmatch(name)
            if key is None or array.dtype.kind not in "iu":
                raise FormatError(f"{path}: {name[:60]!r} is not integers under a key iteration_layer")
            grid[int(key.group(1)), int(key.group(2))] = array
        ranks[int(next(group for group in match.groups() if group))] = grid
    return ranks


def _check_grid(folder: Path, ranks: dict[int, Grid]) -> list[int]:
    """Decoder layers, rising; every rank must have every layer in every of the consecutive iterations."""
    keys = {key for grid in ranks.values() for key in grid}
    if not keys:
        raise FormatError(f"{folder}: the statistics files are empty")
    iterations = sorted({iteration for iteration, _ in keys})
    layers = sorted({layer for _, layer in keys})
    if len(layers) > MOST_LAYERS:
        raise FormatError(f"{folder}: {len(layers)} layers exceed {MOST_LAYERS}")
    if iterations[-1] - iterations[0] + 1 != len(iterations):
        raise FormatError(f"{folder}: iterations {iterations[0]}..{iterations[-1]} are not contiguous")
    for rank, grid in ranks.items():
        missing = len(iterations) * len(layers) - len(grid)
        if missing:
            raise FormatError(f"{folder}: rank {rank} lacks {missing} of its iteration_layer keys")
    return layers


def _counts_of(folder: Path, array: np.ndarray, experts: int) -> np.ndarray:
    if array.shape != (experts,) or (len(array) and (array.min() < 0 or array.max() > 1 << 53)):
        raise FormatError(f"{folder}: counts must be {experts} numbers from 0, not {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _import_raw(
    folder: Path, out: str | Path, options: ImportOptions, raw: dict[int, Grid], counts: dict[int, Grid], experts: int
) -> Imported:
    layers = _check_grid(folder, raw)
    widths = {array.shape[1] if array.ndim == 2 else 0 for grid in raw.values() for array in grid.values()}
    if len(widths) != 1 or not 1 <= (top_k := widths.pop()) <= 1024:
        raise FormatError(f"{folder}: raw arrays must all be (tokens, K) with one K")
    for rank, grid in raw.items():
        for key, array in grid.items():
            _check_raw(folder, rank, key, array, counts.get(rank, {}).get(key), experts)
    findings = Findings(folder, strict=options.strict)
    for note in (_NOTE_PSEUDO, _NOTE_ORDER):
        findings.note(note)
    outline = TraceOutline(len(layers), top_k, num_experts=experts, layer_ids=tuple(layers))
    return write_trace(out, outline, lambda: _pieces(folder, raw, layers), options, findings)


def _check_raw(
    folder: Path, rank: int, key: tuple[int, int], array: np.ndarray, counts: np.ndarray | None, experts: int
) -> None:
    """Raw ids in range, and as many as were counted: of a layer that ran twice the raw file has the last chunk only."""
    where = f"{folder}: rank {rank}, iteration {key[0]}, layer {key[1]}"
    if array.size and (array.min() < -1 or array.max() >= experts):
        raise FormatError(f"{where}: an expert id lies outside -1..{experts - 1}")
    if counts is None:
        return
    ids = array.astype(np.int64).ravel()
    if not np.array_equal(np.bincount(ids[ids >= 0], minlength=experts), _counts_of(folder, counts, experts)):
        raise FormatError(
            f"{where}: raw ids and counts disagree, as when a layer runs in chunks; import the counts only"
        )


def _pieces(folder: Path, raw: dict[int, Grid], layers: list[int]) -> Iterator[Piece]:
    """One pseudo-sequence per iteration and rank; ranks that saw the very same tokens are taken once."""
    sequence = 0
    for iteration in sorted({key[0] for grid in raw.values() for key in grid}):
        seen: set[bytes] = set()
        for rank, grid in sorted(raw.items()):
            arrays = [grid[iteration, layer] for layer in layers]
            if len({len(array) for array in arrays}) != 1:
                raise FormatError(f"{folder}: rank {rank}, iteration {iteration} has unequal tokens in its layers")
            ids_TLK = np.stack(arrays, axis=1).astype(np.int32)
            data = ids_TLK.tobytes()
            if not len(ids_TLK) or data in seen:
                continue
            seen.add(data)
            yield {"topk_ids": ids_TLK, "sequence_ids": np.full(len(ids_TLK), sequence)}
            sequence += 1
