"""`routed_experts` of SGLang and vLLM request outputs, as JSON lines: the best trace source of both engines.

One object per request: `routed_experts` (base64), `encoding` (`sglang-int32`: raw int32; `npy`: an .npy file),
`num_layers` and `top_k` (needed for `sglang-int32`), optional `request_id`, `prompt_tokens` and `start`. An array is
(tokens, L*, K): all decoder layers, dense ones with the same id K times.
"""

import base64
import binascii
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.containers.npz import DAMAGE, read_array_header
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.canonical import (
    MOST_LAYERS,
    Imported,
    ImportOptions,
    Piece,
    TraceOutline,
    expert_count,
    write_trace,
)
from moeplace.profiling.imports.json_lines import read_json_lines

_SGLANG, _NPY = "sglang-int32", "npy"
_NOTE_ORDER = "no gate weights in the source: the first expert of a token need not have the greatest weight"
_NOTE_SINGLE = "layers whose ids are all 0 were taken for dense ones"


def import_sglang_requests(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read JSON lines of SGLang requests (encoding `sglang-int32` unless said otherwise)."""
    return import_requests(source, out, options, encoding=_SGLANG)


def import_requests(source: str | Path, out: str | Path, options: ImportOptions, *, encoding: str) -> Imported:
    """Read JSON lines of requests, twice: once to see layers and ids, once to write.

    Raises:
        InputError: there is no such file, or its ids break a rule.
        FormatError: a line is not such a request, or requests disagree in shape.
    """
    survey = _survey(source, encoding)
    moe = np.flatnonzero(survey.distinct_L)
    if not len(moe):
        raise InputError(f"{source}: no layer has different experts for a token, so none is an MoE layer")
    notes = [_NOTE_ORDER] + ([_NOTE_SINGLE] if survey.top_k == 1 else [])
    experts = expert_count(survey.greatest, options, notes)
    outline = TraceOutline(
        np.full(len(moe), experts),
        survey.top_k,
        layer_ids=moe.tolist(),
        num_hidden_layers=len(survey.distinct_L),
        notes=notes,
    )
    return write_trace(out, outline, _pieces(source, encoding, moe, survey.decode), options)


@dataclass
class _Survey:
    """What the first reading finds: per decoder layer, whether any token has ids that show an MoE layer."""

    distinct_L: np.ndarray
    top_k: int
    greatest: int
    decode: bool


def _survey(source: str | Path, encoding: str) -> _Survey:
    survey: _Survey | None = None
    for where, record in read_json_lines(source):
        ids_TLK = _decode(where, record, encoding)
        layers, top_k = ids_TLK.shape[1:]
        if survey is None:
            survey = _Survey(np.zeros(layers, dtype=bool), top_k, -1, True)
        if (len(survey.distinct_L), survey.top_k) != (layers, top_k):
            raise FormatError(
                f"{where} has {layers} layers and top-k {top_k}, "
                f"lines before {len(survey.distinct_L)} and {survey.top_k}"
            )
        if len(ids_TLK):
            ordered = np.sort(ids_TLK, axis=2)
            repeats_TL = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2) if top_k > 1 else ids_TLK[..., 0] == 0
            survey.distinct_L |= ~repeats_TL.all(axis=0)
            survey.greatest = max(survey.greatest, int(ids_TLK.max()))
        survey.decode &= "prompt_tokens" in record
    if survey is None:
        raise FormatError(f"{source} is empty: one JSON object per request is needed")
    return survey


def _pieces(source: str | Path, encoding: str, moe: np.ndarray, decode: bool) -> Iterator[Piece]:
    for sequence, (where, record) in enumerate(read_json_lines(source)):
        ids_TLK = _decode(where, record, encoding)[:, moe]
        positions = _number(where, record, "start", 0) + np.arange(len(ids_TLK))
        piece = {"topk_ids": ids_TLK, "sequence_ids": np.full(len(ids_TLK), sequence), "positions": positions}
        if decode:
            piece["is_decode"] = positions >= _number(where, record, "prompt_tokens", 0)
        if len(ids_TLK):
            yield piece


def _decode(where: str, record: dict[str, Any], default: str) -> np.ndarray:
    """(tokens, L*, K) int32 ids of one request."""
    text, encoding = record.get("routed_experts"), record.get("encoding", default)
    if not isinstance(text, str) or encoding not in (_SGLANG, _NPY):
        raise FormatError(f"{where} has no base64 routed_experts in encoding {_SGLANG} or {_NPY}")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: routed_experts is not base64") from error
    ids_TLK = _from_npy(where, data) if encoding == _NPY else _from_int32(where, record, data)
    layers, top_k = ids_TLK.shape[1:]
    if not 1 <= layers <= MOST_LAYERS or not 1 <= top_k <= 1024:
        raise FormatError(f"{where}: routed_experts of {layers} layers and top-k {top_k} is impossible")
    if ids_TLK.size and (ids_TLK.min() < -1 or ids_TLK.max() >= 1 << 20):
        raise FormatError(f"{where}: an expert id lies outside -1..{(1 << 20) - 1}")
    return ids_TLK.astype(np.int32)


def _from_int32(where: str, record: dict[str, Any], data: bytes) -> np.ndarray:
    layers, top_k = _number(where, record, "num_layers", 0), _number(where, record, "top_k", 0)
    if not layers or not top_k:
        raise FormatError(f"{where}: encoding {_SGLANG} needs num_layers (all decoder layers) and top_k")
    if len(data) % (4 * layers * top_k):
        raise FormatError(f"{where}: {len(data)} bytes are no multiple of 4 x num_layers ({layers}) x top_k ({top_k})")
    return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)


def _from_npy(where: str, data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = read_array_header(file)
        if len(shape) != 3 or dtype.kind not in "iu":
            raise ValueError(f"{dtype} {shape} are not integers (tokens, layers, top-k)")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
    except DAMAGE as error:
        raise FormatError(f"{where}: routed_experts is not a whole .npy: {str(error)[:200]}") from error


def _number(where: str, record: dict[str, Any], name: str, default: int) -> int:
    value = record.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 30:
        raise FormatError(f"{where}: {name} must be a number from 0, not {str(value)[:40]}")
    return value
