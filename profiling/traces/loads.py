"""LoadStats: expert loads without tokens, and their file. Enough to balance, not enough for locality.

The file is an `.npz` with `load` (L, E) and `meta`, the bytes of a JSON object. Shape letters: L MoE layers, E experts.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplace.profiling.containers.npz import read_npz
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write
from moeplace.profiling.traces.trace import MOST_EXPERTS, RoutingTrace

FORMAT = "moeplace.load/1"
WITHOUT_TOKENS = (
    "loads without tokens: only the balance of expert load can be optimised; ranks per token, stay rate and "
    "activated experts need a trace of single tokens"
)


_SIZES = ("expert_bytes", "hidden_size", "kv_dim", "shared_experts")


@dataclass(frozen=True, eq=False)
class LoadStats:
    """How many token assignments every expert received.

    Attributes:
        load: (L, E) int64, not negative; columns beyond a layer's own experts are zero.
        experts_per_layer: (L,) int64, or None when every layer has E.
        layer_ids: (L,) int64, decoder-layer index of each MoE layer, rising; by default 0..L-1.
        num_hidden_layers: decoder layers in all, dense ones included; 0 = up to the last MoE layer.
        model: name of the model.
        notes: remarks on where the counts come from.
        expert_bytes: bytes of one expert's weights, 0 when unknown.
        hidden_size: hidden size D of the model, 0 when unknown.
        kv_dim: K/V elements of a token and decoder layer, 0 when unknown.
        shared_experts: shared experts of an MoE layer.

    Raises:
        InputError: shapes disagree, a load is negative, or no token was counted.
    """

    load: np.ndarray
    experts_per_layer: np.ndarray | None = None
    layer_ids: np.ndarray | None = None
    num_hidden_layers: int = 0
    model: str = ""
    notes: tuple[str, ...] = ()
    expert_bytes: int = 0
    hidden_size: int = 0
    kv_dim: int = 0
    shared_experts: int = 0

    def __post_init__(self) -> None:
        load_LE = np.asarray(self.load)
        if load_LE.ndim != 2 or not load_LE.size or not np.issubdtype(load_LE.dtype, np.integer):
            raise InputError(f"load must be integers of shape (layers, experts), not {load_LE.dtype} {load_LE.shape}")
        if load_LE.shape[1] > MOST_EXPERTS:
            raise InputError(f"load of {load_LE.shape[1]} experts must have at most {MOST_EXPERTS}")
        if load_LE.min() < 0:
            raise InputError(f"a load ({load_LE.min()}) must not be negative")
        if not load_LE.any():
            raise InputError("all loads are zero: no token was counted")
        layers, experts = load_LE.shape
        given = np.full(layers, experts) if self.experts_per_layer is None else self.experts_per_layer
        shape = RoutingTrace(  # the rules for these are the trace's
            np.zeros((0, layers, 1), np.int16),
            np.asarray(given),
            layer_ids=self.layer_ids,
            num_hidden_layers=self.num_hidden_layers,
        )
        if shape.num_experts != experts:
            raise InputError(
                f"the largest of experts_per_layer ({shape.num_experts}) must be {experts}, the columns of load"
            )
        if (load_LE[np.arange(experts) >= shape.experts_per_layer[:, None]] != 0).any():
            raise InputError("an expert beyond experts_per_layer has load")
        load_LE = np.array(load_LE, dtype=np.int64)
        load_LE.flags.writeable = False
        object.__setattr__(self, "load", load_LE)
        for name in ("experts_per_layer", "layer_ids", "num_hidden_layers"):
            object.__setattr__(self, name, getattr(shape, name))

    @property
    def num_layers(self) -> int:
        return self.load.shape[0]

    @property
    def num_experts(self) -> int:
        """E: the most experts any layer has."""
        return self.load.shape[1]

    def equals(self, other: "LoadStats") -> bool:
        """Whether both hold the same loads and metadata."""
        arrays = all(
            np.array_equal(getattr(self, n), getattr(other, n)) for n in ("load", "experts_per_layer", "layer_ids")
        )
        plain = ("num_hidden_layers", "model", "notes", *_SIZES)
        return arrays and all(getattr(self, name) == getattr(other, name) for name in plain)


def save_load(path: str | Path, stats: LoadStats) -> None:
    """Write a load file, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    meta = {
        "format": FORMAT,
        "experts_per_layer": np.asarray(stats.experts_per_layer).tolist(),
        "layer_ids": np.asarray(stats.layer_ids).tolist(),
        "num_hidden_layers": stats.num_hidden_layers,
        "model": stats.model,
        "notes": list(stats.notes),
        **{name: getattr(stats, name) for name in _SIZES},
    }
    with atomic_write(path) as file:
        np.savez(file, load=stats.load, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))


def load_load(path: str | Path) -> LoadStats:
    """Read a load file written by `save_load`.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a load file of ours; `moeplace import` reads other formats.
    """
    arrays = dict(read_npz(path))
    if not is_load(arrays):
        raise FormatError(f"{path} is not a moeplace load file: use `moeplace import --from load` for other formats")
    try:
        meta = json.loads(arrays["meta"].tobytes())
        del meta["format"]
        meta["notes"] = tuple(meta["notes"])
        return LoadStats(arrays["load"], **meta)
    except InputError as error:
        raise FormatError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} is not a moeplace load file: its metadata is damaged") from error


def load_if_load(path: str | Path) -> LoadStats | None:
    """The load file at `path`, None where it is another file.

    Raises:
        InputError: there is no such file.
        FormatError: it is no `.npz`, or a damaged load file.
    """
    return load_load(path) if is_load(dict(read_npz(path))) else None


def is_load(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the arrays of an `.npz` are those of a load file."""
    if "meta" not in arrays or "load" not in arrays or arrays["meta"].nbytes > 1 << 26:
        return False
    try:
        return bool(json.loads(arrays["meta"].tobytes())["format"] == FORMAT)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
