"""Recording: the tokens of a routing trace that the policy plans with, read once per process and thinned.

Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.profiling.errors import InputError

MOST_TOKENS = 8192
"""Tokens that are kept, spread evenly over the trace."""
MOST_BYTES = 1 << 32
"""A larger file is not read inside an engine."""


@dataclass(frozen=True, eq=False)
class Recording:
    """Where tokens went.

    Attributes:
        ids_LTK: (L, T, K) int16 or int32 expert ids of each token, -1 = none.
        experts_L: (L,) experts of each layer.
        layer_ids: (L,) decoder layer of each.
        decoder_layers: of the model.
    """

    ids_LTK: np.ndarray
    experts_L: np.ndarray
    layer_ids: np.ndarray
    decoder_layers: int

    def rows_for(self, layers: int, experts: int) -> np.ndarray:
        """(layers,) int64 layer of the recording for each row of an engine, -1 = a dense one.

        Engines have a row for every MoE layer (vLLM), or for every decoder layer (SGLang).

        Raises:
            InputError: the recording is of another model.
        """
        own = len(self.experts_L)
        if layers not in (own, self.decoder_layers):
            raise InputError(f"the trace has {own} MoE layers of {self.decoder_layers} in all, the engine {layers}")
        if (self.experts_L != experts).any():
            raise InputError(f"the trace has {self.experts_L.max()} experts a layer, the engine {experts}")
        if layers == own:
            return np.arange(own)
        rows_L = np.full(layers, -1)
        rows_L[self.layer_ids] = np.arange(own)
        return rows_L


def recording_of(trace: Any) -> Recording:
    """Of a path, a `RoutingTrace`, or a recording as it is. A path is read once per process.

    Raises:
        InputError, FormatError: it cannot be read, is too large, is no trace, or holds no token.
    """
    if isinstance(trace, Recording):
        return trace
    if isinstance(trace, str | os.PathLike):
        return _FILES.get(os.fspath(trace))
    return _thinned(trace)


class _Files:
    """Recordings of this process by path."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Recording | Exception] = {}

    def get(self, path: str) -> Recording:
        with self._lock:
            if path not in self._known:
                try:
                    self._known[path] = _read(path)
                except Exception as error:  # said again without trying again
                    self._known[path] = error
            found = self._known[path]
        if isinstance(found, Exception):
            raise found
        return found


_FILES = _Files()


def _read(path: str) -> Recording:
    from moeplace.profiling.traces.file import load_trace

    if not os.path.isfile(path):
        raise InputError(f"{path} was not found")
    if os.path.getsize(path) > MOST_BYTES:
        raise InputError(f"{path} has {os.path.getsize(path) >> 20} MiB; inside an engine at most {MOST_BYTES >> 20}")
    return _thinned(load_trace(path))


def _thinned(trace: Any) -> Recording:
    """Tokens spread evenly; null experts, which are never dispatched, are none."""
    tokens = trace.num_tokens
    if not tokens:
        raise InputError("the trace holds no token")
    kept_T = np.arange(min(tokens, MOST_TOKENS)) * tokens // min(tokens, MOST_TOKENS)
    ids_TLK, experts_L = np.asarray(trace.topk_ids[kept_T]), np.asarray(trace.experts_per_layer)
    ids_TLK = np.where(ids_TLK < experts_L[None, :, None], ids_TLK, -1)
    ids_LTK = np.ascontiguousarray(ids_TLK.transpose(1, 0, 2).astype(np.int32))
    ids_LTK.setflags(write=False)
    return Recording(ids_LTK, experts_L, np.asarray(trace.layer_ids), int(trace.num_hidden_layers))
