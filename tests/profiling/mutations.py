"""Damage to files: what truncated copies, flipped bits, foreign tools and hostile authors produce."""

import gzip
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

CANARY = Path("fuzz-canary")  # a file that executed code would leave behind
_TOKENS = (
    b"9" * 30,
    b"-1",
    b"null",
    b"[]",
    b"{}",
    b"1e400",
    b"NaN",
    b"[" * 2000,
    b"\xff\xfe",
    b"\x00",
    b"(1, 1, 99999999999)",
    b"'descr': '|O'",
    b"18446744073709551615",
)


class _Execute:
    """Pickles to a call of `open(CANARY, "w")`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(CANARY), "w")


def mutate_source(original: Path, target: Path, rng: np.random.Generator) -> Path:
    """A damaged copy of a file, or of a folder with one damaged file; keeps the suffixes."""
    if target.is_dir():
        shutil.rmtree(target)
    target = target.with_name(target.name.split(".")[0] + ("" if original.is_dir() else "".join(original.suffixes)))
    if original.is_dir():
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(original, target)
        files = sorted(target.iterdir())
        victim = files[int(rng.integers(len(files)))]
        if rng.random() < 0.1:
            victim.unlink()
        else:
            victim.write_bytes(mutate(victim.read_bytes(), rng))
        return target
    target.write_bytes(mutate(original.read_bytes(), rng))
    return target


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three kinds of damage; archives are damaged inside a member (with right checksums) half of the time."""
    if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.5:
        return _inside_zip(data, rng)
    if data.startswith(b"\x1f\x8b") and rng.random() < 0.5:
        return gzip.compress(mutate(gzip.decompress(data), rng), mtime=0)
    for _ in range(int(rng.integers(1, 4))):
        data = _DAMAGES[int(rng.integers(len(_DAMAGES)))](data, rng)
    return data


def _inside_zip(data: bytes, rng: np.random.Generator) -> bytes:
    source = zipfile.ZipFile(io.BytesIO(data))
    names = source.namelist()
    victim = names[int(rng.integers(len(names)))]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", source.infolist()[0].compress_type) as archive:
        for name in names:
            content = source.read(name)
            if name == victim:
                if rng.random() < 0.1:
                    continue
                content = _DAMAGES[int(rng.integers(len(_DAMAGES)))](content, rng)
            archive.writestr(name, content)
    return target.getvalue()


def _position(data: bytes, rng: np.random.Generator) -> int:
    return int(rng.integers(len(data) + 1))


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(changed)


def _header(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a byte near the beginning, where lengths and types are."""
    if not data:
        return data
    changed = bytearray(data)
    changed[int(rng.integers(min(len(data), 160)))] = int(rng.integers(256))
    return bytes(changed)


def _truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: _position(data, rng)]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = _position(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _token(data: bytes, rng: np.random.Generator) -> bytes:
    at = _position(data, rng)
    return data[:at] + _TOKENS[int(rng.integers(len(_TOKENS)))] + data[at + int(rng.integers(8)) :]


def _digits(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace one decimal digit by several: sizes, shapes, ids."""
    places = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return data
    at = places[int(rng.integers(len(places)))]
    return data[:at] + str(int(rng.integers(10 ** int(rng.integers(1, 15))))).encode() + data[at + 1 :]


def _duplicate(data: bytes, rng: np.random.Generator) -> bytes:
    low, high = sorted((_position(data, rng), _position(data, rng)))
    return data[:high] + data[low : min(high, low + 4096)] + data[high:]


def _wide(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite four or eight bytes with an extreme number."""
    if len(data) < 8:
        return data
    at = int(rng.integers(len(data) - 7))
    extreme = (2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**62, 0, 1 << 40)[int(rng.integers(7))]
    return data[:at] + extreme.to_bytes(8, "little") + data[at + 8 :]


def _pickle(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace everything by a pickle that executes something, or by one with a huge memo."""
    if rng.random() < 0.5:
        return pickle.dumps({"logical_count": _Execute()}, protocol=2)
    return b"\x80\x02]r\xff\xff\xff\x7f."


def _empty(data: bytes, rng: np.random.Generator) -> bytes:
    return b""


_DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flip,
    _flip,
    _header,
    _truncate,
    _insert,
    _token,
    _digits,
    _digits,
    _duplicate,
    _wide,
    _pickle,
    _empty,
)
