"""Calibration: links and expert time, measured on a cluster or nominal, and their file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeplace.placement.cluster import INTER_NODE, INTRA_NODE, Cluster, Link
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json, write_json

CALIBRATION_FORMAT = "moeplace.calibration/1"
SIZE_TOLERANCE = 0.02
"""Relative difference of sizes that passes for none: an expert may have biases that a measured one has not."""


@dataclass(frozen=True)
class ExpertTime:
    """Seconds a rank of speed 1 spends on one layer's experts: affine in its tokens and its activated experts."""

    fixed: float = 10e-6
    per_token: float = 45e-9
    per_activated: float = 6e-6

    def __post_init__(self) -> None:
        for name in ("fixed", "per_token", "per_activated"):
            if getattr(self, name) < 0:
                raise InputError(f"expert time {name} ({getattr(self, name)} s) must not be negative")


@dataclass(frozen=True)
class Calibration:
    """What was measured on a cluster, or the defaults of `cluster.py` and `ExpertTime`.

    Attributes:
        intra, inter: latency and bandwidth of both tiers.
        expert: time of the expert computation.
        other_seconds_per_layer: what a layer costs beside experts and exchanges, the same for every placement.
        mode_seconds_per_layer: the same by mode, where it was measured by mode; a key is a mode, or a mode and its form
            ("dispatch-combine node-aware"). Negative where work hides latency.
        kv_exposed: seconds by which a `coherent` step takes longer per second that its K/V occupy links, when they
            travel in pieces beside the layers; None = not measured: hidden as far as links have room.
        conditions: where and how it was measured.
    """

    intra: Link = INTRA_NODE
    inter: Link = INTER_NODE
    expert: ExpertTime = ExpertTime()
    other_seconds_per_layer: float = 0.0
    mode_seconds_per_layer: dict[str, float] = field(default_factory=dict)
    kv_exposed: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def layer_overhead(self, label: str) -> float:
        """Seconds of a layer beside experts and exchanges, in the mode (and form) `label`."""
        return self.mode_seconds_per_layer.get(label, self.other_seconds_per_layer)

    def other_sizes(self, wanted: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Where it was measured with other sizes than those of a step: (measured, wanted) by name in `conditions`.

        Sizes that a side does not know (0, or none in the file) are no difference.
        """
        measured = {name: self.conditions.get(name) or 0 for name in wanted}
        return {
            name: (measured[name], value)
            for name, value in wanted.items()
            if measured[name] and value and abs(measured[name] - value) > SIZE_TOLERANCE * value
        }

    def apply(self, cluster: Cluster) -> Cluster:
        """`cluster` with the measured links."""
        return cluster.replace(intra=self.intra, inter=self.inter)

    def slower(self, times: float) -> Self:
        """The same with links of so much less bandwidth."""
        return replace(self, intra=self.intra.slower(times), inter=self.inter.slower(times))

    def save(self, path: str | Path) -> None:
        """Write a calibration file, atomically."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        links = {
            tier: {
                "latency": link.latency,
                "bandwidth": link.bandwidth,
                "node_bandwidth": link.node_bandwidth if np.isfinite(link.node_bandwidth) else None,
            }
            for tier, link in (("intra", self.intra), ("inter", self.inter))
        }
        expert = {name: getattr(self.expert, name) for name in ("fixed", "per_token", "per_activated")}
        document: dict[str, Any] = {"format": CALIBRATION_FORMAT, **links, "expert": expert}
        document["other_seconds_per_layer"] = self.other_seconds_per_layer
        document["mode_seconds_per_layer"] = self.mode_seconds_per_layer
        document["kv_exposed"] = self.kv_exposed
        return {**document, "conditions": self.conditions}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a calibration file.

        Raises:
            InputError: there is no such file or a value breaks a rule.
            FormatError: it is not a calibration file.
        """
        document = read_json(path)
        if not isinstance(document, dict) or document.get("format") != CALIBRATION_FORMAT:
            raise FormatError(f"{path} is not a calibration file: it lacks the tag {CALIBRATION_FORMAT!r}")
        try:
            links = {}
            for tier in ("intra", "inter"):
                values = dict(document[tier])
                values["node_bandwidth"] = values.get("node_bandwidth") or float("inf")
                links[tier] = Link(**values)
            exposed = document.get("kv_exposed")
            return cls(
                **links,
                expert=ExpertTime(**document["expert"]),
                other_seconds_per_layer=float(document.get("other_seconds_per_layer", 0.0)),
                mode_seconds_per_layer={k: float(v) for k, v in document.get("mode_seconds_per_layer", {}).items()},
                kv_exposed=None if exposed is None else float(exposed),
                conditions=dict(document.get("conditions", {})),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is not a calibration file: {error}") from error
