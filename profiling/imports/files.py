"""Which files an import reads."""

from pathlib import Path

from moeplace.profiling.errors import InputError


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
