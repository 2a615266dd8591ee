"""What the runtime counts while it runs: collectives, bytes, copies, tokens, seconds.

Shape letters: L MoE layers, E experts per layer.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TIERS = ("local", "intra_node", "inter_node")
OUTSIDE = -1
"""The layer of a collective that belongs to no MoE layer (K/V hand-over, sampled tokens)."""


@dataclass
class Counters:
    """Running totals of one rank. `snapshot()` gives them as data, `reset()` starts again.

    Attributes:
        steps: forward passes.
        collectives: (layer, kind) -> collectives issued; layer -1 = outside the MoE layers.
        bytes_sent: tier -> bytes this rank sent; `local` = to itself.
        copies_sent: token rows this rank sent to other ranks in dispatches.
        tokens: layer -> assignments (token, expert) that experts of this rank computed.
        activated: layer -> experts of this rank that got at least one token, summed over steps.
        layer_passes: MoE layers run (layers x steps), the divisor of per-layer means.
        single_exchange: layer passes in which one exchange was enough.
        overflows: layer passes in which some pair exceeded its capacity and an extra round followed.
        seconds: "exchange" -> seconds inside collectives, waiting for others included; "experts" -> inside the expert
            computation. By the host's clock: on a GPU, where both run on, that is the time to launch them.
    """

    steps: int = 0
    collectives: Counter[tuple[int, str]] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    copies_sent: int = 0
    tokens: Counter[int] = field(default_factory=Counter)
    activated: Counter[int] = field(default_factory=Counter)
    layer_passes: int = 0
    single_exchange: int = 0
    overflows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def reset(self) -> None:
        """Set every total to zero."""
        self.steps = self.copies_sent = self.layer_passes = self.single_exchange = self.overflows = 0
        for total in (self.collectives, self.bytes_sent, self.tokens, self.activated):
            total.clear()
        self.seconds.clear()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def collectives_in_layers(self) -> int:
        """Collectives that belong to MoE layers."""
        return sum(count for (layer, _), count in self.collectives.items() if layer != OUTSIDE)

    def snapshot(self) -> dict[str, Any]:
        """The totals and the means that follow from them, ready for JSON."""
        passes = max(self.layer_passes, 1)
        per_step: Counter[str] = Counter()
        for (layer, kind), count in self.collectives.items():
            if layer == OUTSIDE:
                per_step[kind] += count
        return {
            "steps": self.steps,
            "layer_passes": self.layer_passes,
            "collectives_per_layer": self.collectives_in_layers() / passes,
            "collectives_outside_layers": dict(per_step),
            "bytes_sent": {tier: self.bytes_sent[tier] for tier in TIERS},
            "copies_sent": self.copies_sent,
            "tokens_computed": self.tokens.total(),
            "activated_experts_per_layer": self.activated.total() / passes,
            "single_exchange_share": self.single_exchange / passes,
            "overflows": self.overflows,
            "seconds": dict(self.seconds),
        }


@dataclass
class LoadWindow:
    """Routing seen by this rank since the last reset: the input of a re-planning decision.

    Every token is counted by exactly one rank (the one that routes it), so loads of all ranks add up.

    Attributes:
        load: (L, E) int64, assignments per expert.
        keep: how many recent token rows of ids to keep per layer; 0 = none.
    """

    load: np.ndarray
    keep: int = 0
    recent: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def record(self, layer: int, ids: np.ndarray) -> None:
        """Add the ids (T, K) of tokens routed in `layer`; -1 = none."""
        flat = ids.reshape(-1)
        flat = flat[flat >= 0]
        self.load[layer] += np.bincount(flat, minlength=self.load.shape[1])
        if self.keep:
            rows = self.recent.setdefault(layer, [])
            rows.append(ids.copy())
            while len(rows) > 1 and sum(map(len, rows)) - len(rows[0]) >= self.keep:
                rows.pop(0)

    def recent_ids(self, layer: int) -> np.ndarray:
        """(T, K) the last `keep` rows of ids of a layer, oldest first."""
        rows = self.recent.get(layer)
        return np.concatenate(rows)[-self.keep :] if rows else np.zeros((0, 0), dtype=np.int64)

    def reset(self) -> None:
        """Forget everything."""
        self.load[:] = 0
        self.recent.clear()
