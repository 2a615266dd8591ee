"""Files that are either whole or absent, and read without executing anything they contain."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moeplace.profiling.errors import FormatError, InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends well, delete it otherwise.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, document: Any) -> None:
    """Write `document` as JSON, atomically, with one line per top-level list row where that helps a reader."""
    text = json.dumps(document, indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: there is no such file or it cannot be read.
        FormatError: it is not JSON.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error


def require_folder_of(*paths: str | Path | None) -> None:
    """Check, before long work, that files can be written there; None is skipped.

    Raises:
        InputError: the folder of a path does not exist, or the path is a folder.
    """
    for path in paths:
        if path is None:
            continue
        if not Path(path).parent.is_dir():
            raise InputError(f"cannot write {path}: the folder {Path(path).parent} does not exist")
        if Path(path).is_dir():
            raise InputError(f"cannot write {path}: it is a folder")


def require_file(path: str | Path) -> Path:
    """`path` as a Path to an existing regular file.

    Raises:
        InputError: nothing is there, or it is a folder.
    """
    found = Path(path)
    if found.is_dir():
        raise InputError(f"{path} is a folder, a file is needed")
    if not found.exists():
        raise InputError(f"no such file: {path}")
    return found
