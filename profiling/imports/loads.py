"""Counts by layer and expert, as balancers take them, in whatever form they are kept."""

from pathlib import Path

from moeplace.profiling.imports.canonical import Findings, Imported, ImportOptions, write_load
from moeplace.profiling.imports.tables.read import DELIMITED, JSON, TENSORS, plain_suffix, read_tables

_RANK_FILES = "*rank*"


def import_load(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read a table, or a folder with one file a rank; rows of zeros are dense layers and left out.

    Raises:
        InputError: there is no such file, or a load is negative.
        FormatError: there is no table in it.
    """
    findings = Findings(source, strict=options.strict)
    table, files = read_tables(source)
    if files > 1:
        findings.note(f"the sum of {files} files")
    else:
        _warn_of_other_ranks(Path(source), findings)
    return write_load(out, table, options, findings)


def is_table(source: str | Path) -> bool:
    """Whether a file, or all files of a folder, can only be tables of counts, whatever engine they come from."""
    path = Path(source)
    names = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
    return bool(names) and all(plain_suffix(one) in DELIMITED for one in names)


def _warn_of_other_ranks(source: Path, findings: Findings) -> None:
    """One file of several ranks: say that the folder would give all of them."""
    if "rank" not in source.name.lower() or plain_suffix(source) not in (*DELIMITED, *JSON, *TENSORS, ".npy", ".npz"):
        return
    others = [one for one in source.parent.glob(_RANK_FILES) if one != source and one.suffix == source.suffix]
    if others:
        findings.warn(
            f"counts of one rank: {len(others)} other files of ranks lie beside {source.name}; "
            "import a folder with all of them to add them up"
        )
