"""EngineLimits: how much an engine holds at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from moeplace.profiling.errors import InputError
from moeplace.runtime.experts.tier_limits import TierLimits


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine holds at once.

    Attributes:
        max_sequences: sequences in flight over all ranks.
        max_length: positions of a sequence, prompt and completion together; None = the model's, at most 2048.
        kv_bytes: K/V memory of a rank; None = no limit. On a CPU it is claimed by the page as sequences grow, and the
            youngest one gives way where it does not suffice; elsewhere, and with models that run whole, it lowers
            `max_sequences`.
        max_prefill_tokens: tokens of a pass that serves prompts: one of every sequence that goes on, then chunks of
            prompts, at least one token of them. It bounds how long arrivals hold up sequences that run.
        staging_rows: experts, of whatever layers, that a rank holds beyond its slots while they arrive.
        recent_ids: tokens of all ranks whose routed ids are kept, beside the loads (`window.recent`).
        rank_sequences: sequences in flight per rank, where the number of ranks may change; None = a share of
            `max_sequences` (all of them where K/V are on every rank).
        reuses_prefixes: a prompt takes over the K/V of another one that begins with the same tokens, running or not.
        alike: how many later requests may overtake one that waits, because their experts are more like those that the
            batch asks for; 0 = requests get a place as they come. See `moeplace.runtime.engine.admission.alike`.
        fixed_shapes: whether steps of single tokens run in fixed shapes where their mode has them (not `allgather`, nor
            with tiers); see `moeplace.runtime.exchange.fixed`.
        tiers: how much of the experts is in fast memory; None = all.
    """

    max_sequences: int = 64
    max_length: int | None = None
    kv_bytes: int | None = None
    max_prefill_tokens: int = 512
    staging_rows: int = 0
    recent_ids: int = 0
    rank_sequences: int | None = None
    tiers: TierLimits | None = None
    reuses_prefixes: bool = True
    fixed_shapes: bool = False
    alike: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.tiers, Mapping):  # as it was written into a document
            object.__setattr__(self, "tiers", TierLimits.of(self.tiers))
        for name in ("max_sequences", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.alike < 0:
            raise InputError(f"alike ({self.alike}) must not be negative: it is how often a request may be overtaken")


DEFAULT_LIMITS = EngineLimits()
