"""Several recordings of one model as one trace (or one file of loads)."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.files import require_folder_of
from moeplace.profiling.imports.canonical import Imported, ImportOptions
from moeplace.profiling.imports.canonical.findings import ranges
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.loads import LoadStats, load_load, save_load
from moeplace.profiling.traces.trace import RoutingTrace, concatenate

Elsewhere = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], Iterable[tuple[int, Any]]]
"""(function, shared, items) -> (index, function(shared, item)) of every item, from wherever it was called."""


def import_several(
    name: str,
    sources: Sequence[str | Path],
    out: str | Path,
    options: ImportOptions,
    *,
    elsewhere: Elsewhere | None = None,
) -> Imported:
    """Read every source in the named format; tokens one recording after another, loads added up.

    Sequences of different recordings stay apart. Where the number of experts is not given, it is the greatest that any
    recording shows.

    Args:
        name: of the format.
        sources: files or folders.
        out: file to write.
        options: for every source.
        elsewhere: reads them on other machines, which must have them under the same paths; None = here.

    Returns:
        What the file holds; drops and remarks begin with the name of their source.

    Raises:
        InputError: recordings are of different models, some hold loads and others tokens, or one breaks a rule.
        FormatError: a source is not in that format.
    """
    if len(sources) == 1 and elsewhere is None:
        return import_from(name, sources[0], out, options)
    target = Path(out)
    require_folder_of(target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:

        def read(options: ImportOptions) -> list[Imported]:
            if elsewhere is not None:
                return _read_elsewhere(elsewhere, (name, options), sources, Path(folder))
            return [import_from(name, each, Path(folder) / f"{i}.part", options) for i, each in enumerate(sources)]

        parts = _read_alike(read, sources, options)
        whole: RoutingTrace | LoadStats
        if parts[0].kind == "load":
            counts = [load_load(part.path) for part in parts]
            _require_one_model(counts, sources)
            save_load(target, whole := _added(counts))
        else:
            traces = [load_trace(part.path) for part in parts]
            _require_one_model(traces, sources)
            save_trace(target, whole := concatenate(traces))
    dropped, remarks = (_said(parts, sources, what) for what in ("dropped", "remarks"))
    return replace(
        parts[0], path=target, num_tokens=sum(part.num_tokens for part in parts), num_experts=whole.num_experts,
        notes=whole.notes, experts_per_layer=tuple(np.asarray(whole.experts_per_layer).tolist()),
        dropped=dropped, remarks=remarks,
    )  # fmt: skip


def _read_alike(
    read: Callable[[ImportOptions], list[Imported]], sources: Sequence[str | Path], options: ImportOptions
) -> list[Imported]:
    """Parts of one kind; traces that show unlike numbers of experts are read again, with the greatest.

    Raises:
        InputError: see `import_several`.
    """
    parts = read(options)
    kinds = {part.kind: str(source) for part, source in zip(parts, sources, strict=True)}
    if len(kinds) > 1:
        raise InputError(f"{kinds['load']} holds loads and {kinds['trace']} tokens: they cannot be one recording")
    if parts[0].kind == "trace" and len({_experts(part) for part in parts}) > 1:
        _require_one_model([load_trace(part.path) for part in parts], sources)
        return read(replace(options, num_experts=_most_experts(parts, options)))
    return parts


def _read_elsewhere(
    elsewhere: Elsewhere, shared: tuple[str, ImportOptions], sources: Sequence[str | Path], folder: Path
) -> list[Imported]:
    """The parts in `folder`, read on other machines."""
    paths = [str(Path(source).absolute()) for source in sources]
    parts: dict[int, Imported] = {}
    for index, (part, content) in elsewhere(read_part, shared, paths):
        path = folder / f"{index}.part"
        path.write_bytes(content)
        parts[index] = replace(part, path=path)
    return [parts[index] for index in range(len(sources))]


def read_part(shared: tuple[str, ImportOptions], source: str) -> tuple[Imported, bytes]:
    """What `import_from` says and writes; `shared` = (format, options)."""
    name, options = shared
    with tempfile.TemporaryDirectory(prefix="moeplace-import-") as folder:
        part = import_from(name, source, Path(folder) / "part", options)
        return part, part.path.read_bytes()


def _said(parts: Sequence[Imported], sources: Sequence[str | Path], what: str) -> tuple[str, ...]:
    """What was said of each source, with its name."""
    pairs = zip(parts, sources, strict=True)
    return tuple(f"{source}: {text}" for part, source in pairs for text in getattr(part, what))


def _require_one_model(found: Sequence[RoutingTrace | LoadStats], sources: Sequence[str | Path]) -> None:
    for one, source in zip(found[1:], sources[1:], strict=True):
        for what, name in (("MoE layers", "num_layers"), ("top-k", "top_k"), ("decoder layers", "layer_ids")):
            ours, first = (_shown(getattr(each, name, None)) for each in (one, found[0]))
            if ours != first:
                raise InputError(f"{source} has other {what} ({ours}) than {sources[0]} ({first})")


def _shown(value: Any) -> str:
    """A number, or decoder layers as ranges."""
    return ranges(value) if isinstance(value, np.ndarray) else str(value)


def _experts(part: Imported) -> tuple[int, ...]:
    """Experts of each layer."""
    return part.experts_per_layer or (part.num_experts,) * part.num_layers


def _most_experts(parts: Sequence[Imported], options: ImportOptions) -> tuple[int, ...]:
    """Experts of each layer that any of them shows.

    Raises:
        InputError: a trace of ours says itself how many there are, or there are null experts, whose ids follow those of
            a number of experts that nobody gave.
    """
    if not all(part.experts_per_layer for part in parts):
        counts = sorted({part.num_experts for part in parts})
        raise InputError(f"traces with {counts[0]} and with {counts[-1]} experts per layer are not of one model")
    if options.null_experts:
        raise InputError("recordings with null experts must say how many experts there are: give --num-experts")
    return tuple(max(counts) for counts in zip(*map(_experts, parts), strict=True))


def _added(parts: Sequence[LoadStats]) -> LoadStats:
    """One count of all, with the experts that any of them has."""
    most_L = np.max([np.asarray(part.experts_per_layer) for part in parts], axis=0)
    load_LE = np.zeros((len(most_L), int(most_L.max())), np.int64)
    for part in parts:
        load_LE[:, : part.num_experts] += part.load
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return replace(parts[0], load=load_LE, experts_per_layer=most_L, notes=notes)
