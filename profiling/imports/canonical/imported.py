"""What an import wrote, and the few lines that say so."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplace.profiling.imports.canonical.findings import ranges
from moeplace.profiling.traces.loads import WITHOUT_TOKENS


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        path: the file.
        kind: "trace", or "load" for loads without tokens.
        num_tokens: tokens of a trace; 0 for loads.
        num_layers: L.
        num_experts: E, the most of any layer.
        top_k: K of a trace; 0 for loads.
        notes: remarks that the file carries too.
        experts_per_layer: experts of each layer; empty = `num_experts` each.
        layer_ids: decoder-layer index of each MoE layer; empty = not looked at.
        num_hidden_layers: decoder layers in all.
        dropped: what was left out, one phrase each.
        remarks: what else to say, one sentence each.
    """

    path: Path
    kind: str
    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int = 0
    notes: tuple[str, ...] = ()
    experts_per_layer: tuple[int, ...] = ()
    layer_ids: tuple[int, ...] = ()
    num_hidden_layers: int = 0
    dropped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for people: sizes, decoder layers, what was dropped."""
        least = min(self.experts_per_layer, default=self.num_experts)
        experts = f"{self.num_experts}" if least == self.num_experts else f"{least} to {self.num_experts}"
        shape = f"{self.num_layers} layers x {experts} experts"
        if self.kind == "load":
            lines = [f"{self.path}: loads of {shape} ({WITHOUT_TOKENS})"]
        else:
            lines = [f"{self.path}: {self.num_tokens} tokens x {shape}, top-{self.top_k}"]
        if self.layer_ids:
            lines.append(f"MoE layers: decoder layers {ranges(np.array(self.layer_ids))} of {self.num_hidden_layers}")
        if self.dropped:
            lines.append(f"dropped: {'; '.join(self.dropped)}")
        return "\n".join([*lines, *self.remarks])
