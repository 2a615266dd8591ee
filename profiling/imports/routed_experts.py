"""`routed_experts` of request outputs, one answer a line: the best trace source of SGLang and vLLM.

An array is (tokens, L*, K): all decoder layers, dense ones with the same id K times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.canonical import Findings, Imported, ImportOptions, Piece, TraceOutline, write_trace
from moeplace.profiling.imports.json_lines import read_json_lines
from moeplace.profiling.imports.responses import PLACES, SGLANG, Capture, captures, decode

_NOTE_ORDER = "no gate weights in the source: the first expert of a token need not have the greatest weight"


def import_sglang_requests(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read answers of SGLang (base64 of raw int32 unless said otherwise)."""
    return import_requests(source, out, options, encoding=SGLANG)


def import_requests(source: str | Path, out: str | Path, options: ImportOptions, *, encoding: str) -> Imported:
    """Read answers, one a line.

    Raises:
        InputError: there is no such file, or its ids break a rule.
        FormatError: a line is not such an answer, or answers disagree in shape.
    """
    reader = _Reader(source, encoding, options)
    layers, top_k, decode_known, empty = reader.shape()
    findings = Findings(source, strict=options.strict)
    findings.note(_NOTE_ORDER)
    if empty:
        findings.drop(
            empty, empty + reader.found, "answers", f"have no routed experts (looked for {PLACES})",
            kind="answers without routed experts",
        )  # fmt: skip
    outline = TraceOutline(layers, top_k, decoder_rows=True)
    return write_trace(out, outline, lambda: reader.pieces(decode_known), options, findings)


def has_requests(source: str | Path) -> bool:
    """Whether the first object of a file of JSON lines holds routed experts."""
    try:
        return any(True for where, record in _first(source) for _ in captures(where, record))
    except FormatError:
        return False


def _first(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, found in enumerate(read_json_lines(source)):
        yield found
        if number == 15:  # some answers of a run may be errors
            return


@dataclass
class _Reader:
    """Reads the answers of a file, as often as asked."""

    source: str | Path
    encoding: str
    options: ImportOptions
    found: int = 0

    def shape(self) -> tuple[int, int, bool, int]:
        """(L*, K, whether every answer says its prompt's length, answers without routed experts)."""
        shape: tuple[int, ...] | None = None
        says_prompt, empty = True, 0
        for where, record in read_json_lines(self.source):
            here = list(captures(where, record))
            empty += not here
            for capture in here:
                ids_TLK = self._decode(capture)
                self.found += 1
                says_prompt &= capture.number("prompt_tokens") is not None
                shape = shape or ids_TLK.shape[1:]
                if ids_TLK.shape[1:] != shape:
                    raise FormatError(
                        f"{capture.where} has {ids_TLK.shape[1]} layers and top-k {ids_TLK.shape[2]}, "
                        f"lines before {shape[0]} and {shape[1]}"
                    )
        if shape is None:
            why = f"no answer of {empty} has routed experts: looked for {PLACES}" if empty else "it is empty"
            raise FormatError(f"{self.source}: {why} (one JSON object per request is needed)")
        return shape[0], shape[1], says_prompt, empty

    def _decode(self, capture: Capture) -> np.ndarray:
        layers = self.options.num_hidden_layers or None
        return decode(capture, encoding=self.encoding, layers=layers, top_k=self.options.top_k)

    def pieces(self, decode_known: bool) -> Iterator[Piece]:
        """One piece a sequence."""
        sequence = 0
        for where, record in read_json_lines(self.source):
            for capture in captures(where, record):
                ids_TLK = self._decode(capture)
                start = capture.number("start", "routed_experts_start_len", "routed_experts_prompt_start") or 0
                positions = start + np.arange(len(ids_TLK))
                piece = {"topk_ids": ids_TLK, "sequence_ids": np.full(len(ids_TLK), sequence), "positions": positions}
                if decode_known:
                    piece["is_decode"] = positions >= (capture.number("prompt_tokens") or 0)
                yield piece
                sequence += 1
