"""What the runtime counts while it runs: collectives, bytes, copies, tokens, seconds."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
        layer_passes: mode -> MoE layers run (layers x steps), the divisor of per-layer means.
        collectives_of_mode: mode -> collectives issued in those.
        single_exchange: coherent layer passes in which one exchange was enough.
        overflows: layer passes in which some pair exceeded its capacity and an extra round followed.
        tokens_reused: tokens of prompts whose home this rank is and whose K/V were taken over, not run.
        experts_found: how activated experts were found where fast memory does not hold them all (resident, cached,
            prefetched, late, host, loaded).
        experts_foreseen: activated experts of layers that an earlier gate was asked about ("asked"), those of them that
            it had named ("named").
        bytes_loaded: bytes of experts that were asked for from host or disk; what is fetched ahead is not among them.
        seconds: "exchange" -> seconds inside collectives, waiting for others included; "experts" -> inside the expert
            computation. By the host's clock: on a GPU, where both run on, that is the time to launch them.
    """

    steps: int = 0
    collectives: Counter[tuple[int, str]] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    copies_sent: int = 0
    tokens: Counter[int] = field(default_factory=Counter)
    activated: Counter[int] = field(default_factory=Counter)
    layer_passes: Counter[str] = field(default_factory=Counter)
    collectives_of_mode: Counter[str] = field(default_factory=Counter)
    single_exchange: int = 0
    overflows: int = 0
    tokens_reused: int = 0
    experts_found: Counter[str] = field(default_factory=Counter)
    experts_foreseen: Counter[str] = field(default_factory=Counter)
    bytes_loaded: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def reset(self) -> None:
        """Set every total to zero."""
        fresh = Counters()
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(fresh, name))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def totals(self) -> dict[str, Any]:
        """The totals alone: those of several ranks, or of several times, can be added."""
        by_kind: Counter[str] = Counter()
        for (_, kind), count in self.collectives.items():
            by_kind[kind] += count
        return {
            "passes": self.steps,
            "layer_passes": dict(self.layer_passes),
            "collectives": dict(by_kind),
            "bytes_sent": {tier: self.bytes_sent[tier] for tier in TIERS},
            "copies_sent": self.copies_sent,
            "tokens_computed": self.tokens.total(),
            "activated_experts": self.activated.total(),
            "single_exchange": self.single_exchange,
            "overflows": self.overflows,
            "tokens_reused": self.tokens_reused,
            "seconds": dict(self.seconds),
            **self._tiers(),
        }

    def _tiers(self) -> dict[str, Any]:
        """What is told only where experts were in several memories."""
        if not self.experts_found:
            return {}
        return {"experts_found": dict(self.experts_found), "bytes_loaded": self.bytes_loaded}

    def snapshot(self) -> dict[str, Any]:
        """The totals and the means that follow from them, ready for JSON."""
        total = self.layer_passes.total()
        passes = max(total, 1)
        per_step: Counter[str] = Counter()
        for (layer, kind), count in self.collectives.items():
            if layer == OUTSIDE:
                per_step[kind] += count
        return {
            "steps": self.steps,
            "layer_passes": total,
            "collectives_per_layer": self.collectives_of_mode.total() / passes,
            "collectives_per_layer_by_mode": {
                mode: self.collectives_of_mode[mode] / count for mode, count in self.layer_passes.items()
            },
            "collectives_outside_layers": dict(per_step),
            "bytes_sent": {tier: self.bytes_sent[tier] for tier in TIERS},
            "copies_sent": self.copies_sent,
            "tokens_computed": self.tokens.total(),
            "activated_experts_per_layer": self.activated.total() / passes,
            "single_exchange_share": self.single_exchange / max(self.layer_passes["coherent"], 1),
            "overflows": self.overflows,
            "tokens_reused": self.tokens_reused,
            "seconds": dict(self.seconds),
            **self._tiers(),
        }
