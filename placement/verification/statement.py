"""Statement: the problem that a placement claims to solve, as its file states it.

Shape letters: L MoE layers, E experts, R ranks, N nodes.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from moeplace.profiling.errors import FormatError

RULES = ("moeplace", "balanced", "nearest-static", "random", "hash")
MODES = ("dispatch-combine", "coherent", "allgather")
OBJECTIVES = ("seconds", "traffic", "imbalance")
SPLITS = ("train", "test", "all")
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What a value of another kind in a file's JSON raises."""


def what_is_wrong(error: Exception) -> str:
    """One of these errors for people."""
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


@dataclass(frozen=True)
class Link:
    """Seconds that a collective costs, and bytes per second of a rank and of a whole node."""

    latency: float
    bandwidth: float
    node_bandwidth: float


@dataclass(frozen=True, eq=False)
class Statement:
    """See the module; `placement.statement` writes it.

    Attributes:
        mode: execution mode.
        objective: "seconds", "traffic" or "imbalance".
        experts_L: (L,) experts of each layer.
        node_R, slots_R, speed_R: (R,) node, slots and relative speed (mean 1) of each rank.
        distance_RR: (R, R) from a topology, or None.
        price_links: (inside nodes, between them), which prices of traffic follow from.
        links: the same as calibrated, which seconds follow from.
        caps_L: (L,) imbalance that each layer is held to, or None.
        max_imbalance: the cap that was asked for, or None.
        survive: ranks that may be lost.
        shared_slots: redundant slots are shared out over layers ("global" budget).
        rule: name of the replica rule.
        batch, hidden_bytes, kv_bytes: of a step, of a token's hidden vector, of its K/V in a layer.
        expert: seconds a layer, a token, an activated expert.
        overhead: seconds of a layer beside experts and exchanges.
        max_moves: most experts fetched per layer, None = any.
        split, mix, seed: which tokens of the trace were fitted to.
        tokens_digest: of those tokens (or loads), "" = not stated.
    """

    mode: str
    objective: str
    experts_L: np.ndarray
    node_R: np.ndarray
    slots_R: np.ndarray
    speed_R: np.ndarray
    distance_RR: np.ndarray | None
    price_links: tuple[Link, Link]
    links: tuple[Link, Link]
    caps_L: np.ndarray | None
    max_imbalance: float | None
    survive: int
    shared_slots: bool
    rule: str
    batch: int
    hidden_bytes: int
    kv_bytes: int
    expert: tuple[float, float, float]
    overhead: float
    max_moves: int | None
    split: str
    mix: str | None
    seed: int
    tokens_digest: str

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Read the entry `problem` of a placement file.

        Raises:
            FormatError: it lacks a key, or a value is of another kind or breaks a rule.
        """
        try:
            return cls(**_fields(document))
        except UNREADABLE as error:
            raise FormatError(f"the entry 'problem' cannot be read: {what_is_wrong(error)}") from error

    def __post_init__(self) -> None:
        """Refuse what no problem is.

        Raises:
            ValueError: a value breaks a rule.
        """
        for name, value, known in (
            ("mode", self.mode, MODES), ("objective", self.objective, OBJECTIVES),
            ("replica rule", self.rule, RULES), ("split", self.split, SPLITS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
        if not isinstance(self.mix, str | None):
            raise ValueError(f"mix {self.mix!r} is no text")
        ranks, layers = (len(self.node_R),), (self.experts_L.size,)
        for name, array, shape, least in (
            ("experts_per_layer", self.experts_L, layers, 1), ("slots_of_rank", self.slots_R, ranks, 0),
            ("speed_of_rank", self.speed_R, ranks, 1e-12), ("caps", self.caps_L, layers, 1 - 1e-9),
            ("distance", self.distance_RR, ranks * 2, 0),
        ):  # fmt: skip
            if array is not None and not (
                0 not in array.shape == shape and least <= array.min() and array.max() < np.inf
            ):
                raise ValueError(f"{name} must be at least {least:g} and of shape {shape}")
        for name, number, least in (
            ("survive", self.survive, 0), ("batch", self.batch, 1), ("hidden bytes", self.hidden_bytes, 0),
            ("K/V bytes", self.kv_bytes, 0), ("seed", self.seed, 0), ("max_moves", self.max_moves or 0, 0),
        ):  # fmt: skip
            if not least <= number < 2**62:
                raise ValueError(f"{name} ({number}) must be at least {least}")
        if not all(0 <= seconds < np.inf for seconds in (*self.expert, self.overhead)):
            raise ValueError("times must be finite and not negative")

    @property
    def num_ranks(self) -> int:
        return len(self.node_R)

    @property
    def num_nodes(self) -> int:
        return int(self.node_R[-1]) + 1


def _fields(document: Any) -> dict[str, Any]:
    cluster, shape, times = document["cluster"], document["shape"], document["calibration"]
    mode, rule = str(document["mode"]), str(document.get("replica_rule", "moeplace"))
    speed_R = np.asarray(cluster["speed_of_rank"], dtype=float)
    if not (speed_R.min() > 0 and speed_R.max() < np.inf):
        raise ValueError("speed_of_rank must be positive and finite")
    caps, distance = document.get("caps"), cluster.get("distance")
    overhead = times.get("mode_seconds_per_layer", {}).get(mode, times.get("other_seconds_per_layer", 0.0))
    most, cap = document.get("max_moves"), document.get("max_imbalance")
    return {
        "mode": mode,
        "objective": str(document["objective"]),
        "experts_L": np.asarray(document["experts_per_layer"], dtype=np.int64),
        "node_R": _nodes(cluster["node_of_rank"]),
        "slots_R": np.asarray(cluster["slots_of_rank"], dtype=np.int64),
        "speed_R": speed_R / speed_R.mean(),
        "distance_RR": None if distance is None else np.asarray(distance, dtype=float),
        "price_links": (_link(cluster["intra"]), _link(cluster["inter"])),
        "links": (_link(times["intra"]), _link(times["inter"])),
        "caps_L": None if caps is None else np.asarray(caps, dtype=float),
        "max_imbalance": None if cap is None else float(cap),
        "survive": int(document.get("survive", 0)),
        "shared_slots": document.get("replica_budget", "per-layer") == "global",
        "rule": rule,
        "batch": int(shape["batch"]),
        "hidden_bytes": int(shape["hidden_size"]) * int(shape["dtype_bytes"]),
        "kv_bytes": int(shape["kv_dim"]) * int(shape["dtype_bytes"]),
        "expert": tuple(float(times["expert"][name]) for name in ("fixed", "per_token", "per_activated")),
        "overhead": float(overhead),
        "max_moves": None if most is None else int(most),
        "split": str(document.get("split", "all")),
        "mix": document.get("mix"),
        "seed": int(document.get("seed", 0)),
        "tokens_digest": str(document.get("tokens_digest", "")),
    }


def _nodes(value: Any) -> np.ndarray:
    """(R,) node of each rank: 0, 1, ... in order, none left out."""
    node_R = np.asarray(value, dtype=np.int64)
    steps = np.diff(node_R, prepend=0) if node_R.ndim == 1 else np.array([2])
    if not len(node_R) or ((steps < 0) | (steps > 1)).any():
        raise ValueError("node_of_rank must count nodes from 0 in order")
    return node_R


def _link(document: Any) -> Link:
    latency, shared = float(document["latency"]), document.get("node_bandwidth")
    bandwidth, of_node = float(document["bandwidth"]), np.inf if shared is None else float(shared)
    if not (0 <= latency < np.inf and 0 < bandwidth < np.inf and of_node > 0):
        raise ValueError("a link must have a finite latency and a positive bandwidth")
    return Link(latency, bandwidth, of_node)
