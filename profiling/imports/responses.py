"""Where engines and frameworks put `routed_experts` in their answers, and how they write it.

SGLang: `meta_info.routed_experts` of /generate, `choices[i].sgl_ext.routed_experts` (or `sglext`, or at the top) of its
OpenAI form: base64 of raw int32. vLLM: `choices[i].routed_experts`: base64 of an `.npy` file. Frameworks: an envelope
`{data, shape, dtype}`, or nested lists. Our own: `routed_experts` beside `encoding`, `num_layers` and `top_k`.
"""

import base64
import binascii
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.profiling.containers.npz import DAMAGE, read_array_header
from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.canonical import MOST_LAYERS
from moeplace.profiling.imports.canonical.survey import as_ids
from moeplace.profiling.traces.trace import MOST_EXPERTS

SGLANG, NPY = "sglang-int32", "npy"
PLACES = "routed_experts, meta_info.routed_experts, choices[i].routed_experts, choices[i].sgl_ext.routed_experts"
_NAME = "routed_experts"
_WRAPPERS = ("meta_info", "sgl_ext", "sglext", "response", "output", "result", "body", "message", "nvext", "extra")
_LISTS = ("choices", "outputs", "responses", "results")
_MOST_TOP_K = 1024
_MAGIC = b"\x93NUMPY"
_TYPES = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64")


@dataclass(frozen=True)
class Capture:
    """The routed experts of one sequence, and what the answer says beside them.

    Attributes:
        where: file, line and place, for messages.
        value: as it stands in the answer.
        said: the objects around it, the innermost first.
    """

    where: str
    value: Any
    said: tuple[dict[str, Any], ...]

    def number(self, *names: str) -> int | None:
        """The first whole number under one of the names in the objects around the value.

        Raises:
            FormatError: it is not a number from 0.
        """
        for around in self.said:
            for name in names:
                value = around.get(name)
                if value is None:
                    continue
                if type(value) is not int or not 0 <= value < 1 << 30:
                    raise FormatError(f"{self.where}: {name} must be a number from 0, not {str(value)[:40]}")
                return value
        return None


def captures(where: str, record: dict[str, Any]) -> Iterator[Capture]:
    """The routed experts in an answer, one for each sequence of it."""
    yield from _search(where, record, (), 5)


def _search(where: str, value: Any, said: tuple[dict[str, Any], ...], depth: int) -> Iterator[Capture]:
    if not isinstance(value, dict) or depth == 0:
        return
    around = (value, *(value[name] for name in ("usage", "meta_info") if isinstance(value.get(name), dict)), *said)
    if value.get(_NAME) is not None:
        yield Capture(where, value[_NAME], around)
        return
    for name in _WRAPPERS:
        yield from _search(where, value.get(name), around, depth - 1)
    for name in _LISTS:
        items = value.get(name)
        for index, item in enumerate(items if isinstance(items, list) else ()):
            yield from _search(f"{where}, {name}[{index}]", item, around, depth - 1)


def decode(capture: Capture, *, encoding: str, layers: int | None, top_k: int | None) -> np.ndarray:
    """(tokens, L*, K) int32 ids of one sequence.

    Args:
        capture: of `captures`.
        encoding: of bare base64 that does not say it itself.
        layers: L*, all decoder layers, where neither the answer nor its encoding says it.
        top_k: K, likewise.

    Raises:
        FormatError: the value cannot be read, or L* or K is missing.
    """
    value = capture.value
    if isinstance(value, dict):
        ids = _from_envelope(capture, value)
    elif isinstance(value, list):
        ids = _from_lists(capture, value)
    elif isinstance(value, str):
        ids = _from_base64(capture, value, encoding, layers, top_k)
    else:
        raise FormatError(f"{capture.where}: routed_experts must be base64, lists, or data with shape and dtype")
    rows, columns = ids.shape[1:]
    if not 1 <= rows <= MOST_LAYERS or not 1 <= columns <= _MOST_TOP_K:
        raise FormatError(f"{capture.where}: routed_experts of {rows} layers and top-k {columns} is impossible")
    if ids.size and (ids.min() < -1 or (ids.max() >= MOST_EXPERTS and ids.max() != np.iinfo(ids.dtype).max)):
        raise FormatError(f"{capture.where}: an expert id lies outside -1..{MOST_EXPERTS - 1}")
    return as_ids(ids)


def _bytes(capture: Capture, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{capture.where}: routed_experts is not base64") from error


def _from_base64(capture: Capture, text: str, encoding: str, layers: int | None, top_k: int | None) -> np.ndarray:
    said = next((around["encoding"] for around in capture.said if "encoding" in around), encoding)
    if said not in (SGLANG, NPY):
        raise FormatError(f"{capture.where}: encoding {str(said)[:40]!r} must be {SGLANG} or {NPY}")
    data = _bytes(capture, text)
    if data.startswith(_MAGIC):
        return _from_npy(capture, data)
    if said == NPY and encoding == NPY and layers is None:
        return _from_npy(capture, data)
    return _from_int32(capture, data, layers, top_k)


def _from_int32(capture: Capture, data: bytes, layers: int | None, top_k: int | None) -> np.ndarray:
    layers = capture.number("num_layers", "num_hidden_layers") or layers
    if not layers:
        raise FormatError(
            f"{capture.where}: raw int32 ids do not say how many decoder layers there are: give --num-hidden-layers"
        )
    found = capture.number("top_k") or _top_k(capture, len(data) // 4, layers) or top_k
    if not found:
        raise FormatError(
            f"{capture.where}: raw int32 ids do not say how many experts a token has, and the answer does not say "
            "prompt_tokens and completion_tokens: give --top-k"
        )
    if len(data) % (4 * layers * found):
        raise FormatError(
            f"{capture.where}: {len(data)} bytes are no multiple of 4 x num_layers ({layers}) x top_k ({found}): "
            "--num-hidden-layers counts all decoder layers"
        )
    return np.frombuffer(data, "<i4").reshape(-1, layers, found)


def _top_k(capture: Capture, numbers: int, layers: int) -> int | None:
    """K from the length of an answer: the last token of a sequence is never routed."""
    prompt, completion = capture.number("prompt_tokens"), capture.number("completion_tokens")
    if prompt is None or completion is None:
        return None
    rows = (prompt + completion - 1 - (capture.number("start") or 0)) * layers
    return numbers // rows if rows > 0 and numbers % rows == 0 and numbers else None


def _from_npy(capture: Capture, data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = read_array_header(file)
        if len(shape) != 3 or dtype.kind not in "iu":
            raise ValueError(f"{dtype} {shape} are not integers (tokens, layers, top-k)")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
    except DAMAGE as error:
        raise FormatError(f"{capture.where}: routed_experts is not a whole .npy: {str(error)[:200]}") from error


def _from_envelope(capture: Capture, value: dict[str, Any]) -> np.ndarray:
    """`{data, shape, dtype}`: raw base64 or lists."""
    data, shape = value.get("data"), value.get("shape")
    if isinstance(data, list) and shape is None:
        return _from_lists(capture, data)
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise FormatError(
            f"{capture.where}: routed_experts needs a shape (tokens, layers, top-k), not {str(shape)[:60]}"
        )
    if isinstance(data, list):
        flat = _flat(capture, data)
    elif isinstance(data, str):
        raw = _bytes(capture, data)
        if raw.startswith(_MAGIC):
            return _from_npy(capture, raw)
        dtype = _integer_type(capture, value.get("dtype"), len(raw), math.prod(shape))
        flat = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    else:
        raise FormatError(f"{capture.where}: routed_experts has no data")
    if flat.size != math.prod(shape):
        raise FormatError(f"{capture.where}: {flat.size} ids do not fill the shape {shape}")
    return flat.reshape(shape)


def _integer_type(capture: Capture, said: Any, size: int, count: int) -> np.dtype:
    """The type of raw ids as `uint8`, `torch.int32` or `<i4` says, or as follows from their size."""
    if said is None and count and size % count == 0:
        said = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}.get(size // count)
    name = str(said).rsplit(".", 1)[-1].strip("<>|=")
    known = {alias: one for one in _TYPES for alias in (one, np.dtype(one).str.strip("<>|="))}
    if name not in known:
        raise FormatError(f"{capture.where}: dtype {str(said)[:40]!r} must be one of {', '.join(_TYPES)}")
    return np.dtype(known[name]).newbyteorder(">" if str(said).startswith(">") else "<")


def _flat(capture: Capture, data: list[Any]) -> np.ndarray:
    try:
        array = np.array(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{capture.where}: routed_experts must hold rows of one length") from error
    if array.dtype.kind not in "iu" and array.size:
        raise FormatError(f"{capture.where}: routed_experts must hold whole numbers")
    return array.ravel().astype(np.int64)


def _from_lists(capture: Capture, value: list[Any]) -> np.ndarray:
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{capture.where}: routed_experts must be lists (tokens, layers, top-k)") from error
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise FormatError(f"{capture.where}: routed_experts must be whole numbers (tokens, layers, top-k)")
    return array
