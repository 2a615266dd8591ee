"""The formats that `moeplace import` reads, by name."""

from collections.abc import Callable
from pathlib import Path

from moeplace.profiling.errors import InputError
from moeplace.profiling.imports.common import Imported, ImportOptions
from moeplace.profiling.imports.npz import import_npz

Importer = Callable[[str | Path, str | Path, ImportOptions], Imported]

IMPORTERS: dict[str, Importer] = {"npz": import_npz}


def import_from(name: str, source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read `source` in the named format and write a trace or a load file.

    Raises:
        InputError: there is no such format or file, or the contents break a rule.
        FormatError: the source is not in that format.
    """
    if name not in IMPORTERS:
        raise InputError(f"format {name!r} is not one of {', '.join(IMPORTERS)}")
    return IMPORTERS[name](source, out, options)
