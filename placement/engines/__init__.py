"""Placement files of serving engines: written with every check the engines lack, and read back.

`write_engine_placement` adds a sidecar `<file>.moeplace.json` with what the format cannot hold; `read_engine_placement`
uses it where it lies beside the file.
"""

import importlib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from moeplace.placement.engines.form import Export, Facts, Rows, build_placement
from moeplace.placement.placement import Placement
from moeplace.placement.repeats import repeat_experts, without_bare_ranks
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.files import read_json, require_file, write_json

ENGINES = {  # name -> module of this package
    "sglang": "sglang",
    "vllm": "vllm",
    "trtllm": "trtllm",
    "vllm-ascend": "vllm_ascend",
    "omni": "omni",
    "exflow": "exflow",
}
REPEATS = ("sglang", "vllm")
"""Engines in which a rank may hold an expert twice (SGLang 0.5.23 and vLLM 0.33.0 do so in maps of their own)."""
ONLY_PLACEMENTS = ("vllm-ascend", "omni")
"""Engines of which no trace or load file is read."""
SIDECAR_FORMAT = "moeplace.export/1"
_HEAD_BYTES = 4096


class Engine(Protocol):
    """A module of this package."""

    def write(self, placement: Placement, path: Path) -> Export:
        """Write the engine's file or raise InputError naming the layer that it cannot express."""
        ...

    def read(self, path: Path, known: Facts) -> Rows:
        """Read the engine's file or raise FormatError; `known` is what the caller and the sidecar say."""
        ...


class RepeatingEngine(Protocol):
    """A module of REPEATS."""

    def write(self, placement: Placement, path: Path, table: np.ndarray | None = None) -> Export:
        """As `Engine.write`; `table` says what empty slots hold."""
        ...


def write_engine_placement(
    path: str | Path,
    placement: Placement,
    engine: str,
    *,
    provenance: dict[str, Any] | None = None,
    repeat: bool = False,
) -> Export:
    """Write `placement` as the file that `engine` loads, read it back, and write the sidecar.

    Args:
        path: the file.
        placement: what to write.
        engine: a name of ENGINES.
        provenance: further entries of the sidecar.
        repeat: empty slots repeat an expert of their rank (engines of REPEATS), and are read back as empty.

    Raises:
        InputError: there is no such engine, its format cannot express the placement (the message names the layer), or
            the file cannot be written.
    """
    target, module = Path(path), _engine(engine)
    if placement.tier is not None:
        backed = int(np.count_nonzero(placement.tier))
        raise InputError(
            f"{engine} keeps every expert in fast memory, but {backed} slots of the placement are backed by host or "
            "disk: solve for a cluster without memory tiers"
        )
    facts = _facts(placement)
    with warnings.catch_warnings():
        if repeat and engine in REPEATS:
            placement = without_bare_ranks(placement)
            export = cast(RepeatingEngine, module).write(placement, target, repeat_experts(placement)[0])
            warnings.simplefilter("ignore", MoeplaceWarning)  # of repeated experts, which are meant
        else:
            export = module.write(placement, target)
        again = build_placement(module.read(target, facts), facts, str(target), engine)
    if not np.array_equal(again.copies_LER, placement.copies_LER):
        raise FormatError(f"{target} does not read back as the placement that was written")
    sidecar = {
        "format": SIDECAR_FORMAT,
        "engine": engine,
        "files": list(export.files),
        "start": export.start,
        "notes": list(export.notes),
        "facts": asdict(facts),
        "digest": placement.digest,
        "reads_back_as": again.digest,
        **(provenance or {}),
    }
    write_json(sidecar_path(target), sidecar)
    return export


def read_engine_placement(path: str | Path, engine: str, *, ignore_sidecar: bool = False, **options: Any) -> Placement:
    """Read an engine's placement file.

    Args:
        path: the file.
        engine: a name of ENGINES.
        ignore_sidecar: read the file as if it stood alone.
        **options: fields of `Facts` that the file leaves open (`num_ranks`, `ranks_per_node`, `num_experts`,
            `layer_ids`, `num_hidden_layers`, `mode`); a sidecar beside the file is asked for the rest.

    Raises:
        InputError: there is no such engine or file, something needed is not known, or the sidecar says that the file
            was made for another number of ranks or experts.
        FormatError: the file is not what the engine loads, or no valid placement.
    """
    source, module = require_file(path), _engine(engine)
    beside = None if ignore_sidecar else _read_sidecar(source, engine)
    if beside is not None:
        _check_sidecar(source, Facts(**options), beside[0])
    known = Facts(**options) if beside is None else Facts(**options).over(beside[0])
    placement = build_placement(module.read(source, known), known, str(source), engine)
    if beside is not None and not options and placement.digest != beside[1]:
        warnings.warn(f"{source} was changed after it was exported", MoeplaceWarning, stacklevel=2)
    return placement


def _check_sidecar(path: Path, given: Facts, beside: Facts) -> None:
    """Refuse to read a table as if it were for another cluster or model than it was made for."""
    for name, noun in (("num_ranks", "ranks"), ("num_experts", "experts")):
        asked, made = getattr(given, name), getattr(beside, name)
        if asked is not None and asked != made:
            raise InputError(
                f"{path} was made for {made} {noun}, as {sidecar_path(path).name} says, and not for {asked}: solve and "
                f"export for {asked}, or read it all the same with --ignore-sidecar"
            )


def is_placement_file(path: str | Path, engine: str) -> bool:
    """Whether a file or folder is a placement of an engine, not one of its traces or loads.

    A sidecar says so; otherwise the engines' own names and keys tell. What is neither is left to the reader of traces,
    whose messages say more.
    """
    source = Path(path)
    if not source.is_file():
        return False
    if engine in ONLY_PLACEMENTS or sidecar_path(source).exists():
        return True
    with source.open("rb") as file:
        head = file.read(_HEAD_BYTES).lstrip()
    if engine == "sglang":
        return source.suffix == ".json" and b'"physical_to_logical_map"' in head and b'"logical_count"' not in head
    if engine == "vllm":
        return head.startswith(b"[") or b'"initial_global_assignments"' in head
    return (engine == "trtllm" and source.suffix in (".yaml", ".yml", ".json")) or (
        engine == "exflow" and source.suffix == ".csv"
    )


def sidecar_path(path: str | Path) -> Path:
    """Where the sidecar of an exported file lies."""
    return Path(path).with_name(f"{Path(path).name}.moeplace.json")


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise InputError(f"engine {name!r} must be one of {', '.join(ENGINES)}")
    module: Any = importlib.import_module(f"moeplace.placement.engines.{ENGINES[name]}")
    engine: Engine = module
    return engine


def _facts(placement: Placement) -> Facts:
    """All that a file may leave open."""
    return Facts(
        num_ranks=placement.num_ranks,
        ranks_per_node=tuple(np.bincount(placement.node_of_rank).tolist()),
        num_experts=placement.num_experts,
        layer_ids=() if placement.layer_ids is None else tuple(placement.layer_ids.tolist()),
        num_hidden_layers=placement.num_hidden_layers,
        mode=placement.mode,
    )


def _read_sidecar(path: Path, engine: str) -> tuple[Facts, str] | None:
    """Facts and digest of the sidecar of `path`, None where there is none of this engine."""
    beside = sidecar_path(path)
    if not beside.exists():
        return None
    document = read_json(beside)
    if not isinstance(document, dict) or document.get("format") != SIDECAR_FORMAT:
        raise FormatError(f"{beside} is not a sidecar of an export: it lacks the tag {SIDECAR_FORMAT!r}")
    if document.get("engine") != engine:
        return None
    try:
        facts = document["facts"]
        numbers = {name: int(facts[name]) for name in ("num_ranks", "num_experts", "num_hidden_layers")}
        lists = {name: tuple(int(value) for value in facts[name]) for name in ("ranks_per_node", "layer_ids")}
        return Facts(**cast(dict[str, Any], {**numbers, **lists}), mode=str(facts["mode"])), str(
            document["reads_back_as"]
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{beside} is not a sidecar of an export: {error}") from error
