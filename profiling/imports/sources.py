"""The formats that `moeplace import` reads, by name."""

from collections.abc import Callable
from pathlib import Path

from moeplace.profiling.errors import InputError
from moeplace.profiling.imports.canonical import Imported, ImportOptions
from moeplace.profiling.imports.exflow import import_exflow
from moeplace.profiling.imports.loads import import_load
from moeplace.profiling.imports.npz import import_npz
from moeplace.profiling.imports.sglang import import_sglang
from moeplace.profiling.imports.trtllm import import_trtllm
from moeplace.profiling.imports.vllm import import_vllm

Importer = Callable[[str | Path, str | Path, ImportOptions], Imported]

IMPORTERS: dict[str, Importer] = {
    "npz": import_npz,
    "sglang": import_sglang,
    "vllm": import_vllm,
    "trtllm": import_trtllm,
    "exflow": import_exflow,
    "load": import_load,
}


def import_from(name: str, source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read `source` in the named format and write a trace or a load file.

    Raises:
        InputError: there is no such format or file, or the contents break a rule.
        FormatError: the source is not in that format.
    """
    if name not in IMPORTERS:
        raise InputError(f"format {name!r} is not one of {', '.join(IMPORTERS)}")
    return IMPORTERS[name](source, out, options)
