"""Text files as people have them: with a byte-order mark, in UTF-16, gzipped."""

import codecs
import gzip
import io
from pathlib import Path
from typing import IO, cast

from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import require_file

_GZIP = b"\x1f\x8b"


def open_text(path: str | Path) -> IO[str]:
    """Open for reading as text; the encoding follows the byte-order mark, UTF-8 without one."""
    file = open_bytes(path)
    head = cast(io.BufferedReader, file).peek(2)[:2]
    encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(file, encoding=encoding, newline=None)


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open for reading, unpacked where gzipped."""
    source = require_file(path)
    with open(source, "rb") as file:
        packed = file.read(2) == _GZIP
    return cast("IO[bytes]", gzip.open(source, "rb") if packed else open(source, "rb"))


def read_bounded(path: str | Path, most: int) -> bytes:
    """The bytes of a file, unpacked where gzipped.

    Raises:
        FormatError: they are more than `most`.
    """
    with open_bytes(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{path} is longer than {most} bytes: save the matrix as .npy")
    return data


def plain_suffix(path: str | Path) -> str:
    """The suffix in lower case, that before `.gz` where gzipped."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz")).suffix
