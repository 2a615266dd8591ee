"""`moeplace bench offload`: a checkpoint served with less fast memory than its experts take, measured and predicted.

1. Without tiers: the reference of time, the routing of other prompts for residency by load.
2. Everything in fast memory, through the tiered store: what the store itself costs.
3. What prediction needs (`offload_prediction`): measured by itself and on other prompts, never by a run it is for.
4. Budgets x policies, each with its logits against the plain model's, its counts, and the walk of the routing it had.

Every serving is done several times over; what counts of a step is the median of its times.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from moeplace.launch.benches.offload_prediction import Measured, Terms
from moeplace.launch.benches.offload_serving import OffloadOptions, Served, Serving
from moeplace.placement.memory import HostTier, Memory
from moeplace.placement.tiers.demand import count_demand
from moeplace.placement.tiers.evaluation import TierEvaluation
from moeplace.placement.tiers.policy import PolicyName
from moeplace.placement.tiers.residency import with_residency
from moeplace.placement.tiers.walk import USES
from moeplace.runtime.comm.group import RankGroup


def offload_bench(
    options: OffloadOptions, *, report: Callable[[float], None] = lambda share: None
) -> dict[str, Any] | None:
    """Run it on the ranks of this group; the figures, on rank 0.

    Raises:
        InputError: a budget does not hold the rows for transit.
    """
    torch.set_num_threads(1)
    group = RankGroup.from_environment(timeout=options.timeout)
    bench = _Bench(options, group)
    runs: list[dict[str, Any]] = []
    pieces = [(budget, policy) for budget in options.budgets for policy in options.policies]
    bench.prepare()
    for done, (budget, policy) in enumerate(pieces):
        report((done + 1) / (len(pieces) + 1))
        runs.append(bench.run(budget, policy))
    for run in runs:
        run["speedup"] = runs[0]["seconds_per_step"] / run["seconds_per_step"]
    return bench.document(runs) if group.rank == 0 else None


class _Bench:
    """One rank's part."""

    def __init__(self, options: OffloadOptions, group: RankGroup) -> None:
        self.options, self.group = options, group
        self.serving = Serving(options, group)

    def prepare(self) -> None:
        """Steps 1 to 3."""
        serving, options = self.serving, self.options
        base = serving.engine(None, options.placement)
        self.start = base.placement
        self.base_difference = serving.difference(base)
        self.other = serving.serve(base, options.other_prompts, rounds=1).trace
        self.slots = int(self.start.slots_of_rank.max())
        whole = serving.engine(serving.limits(self.slots + 1, "pinned"), self.start)
        self.base, self.whole = serving.alternate(base, whole)
        serving.reference = base
        self.terms = Terms.measure(serving, self.start, slots=self.slots)

    def run(self, budget: float, name: PolicyName) -> dict[str, Any]:
        """Step 4, for one budget (share of all experts) and policy."""
        serving, options = self.serving, self.options
        limits = serving.limits(max(round(budget * self.slots), 1), name)
        memory = Memory(HostTier(1.0), fast_slots=np.full(self.group.size, limits.fast_slots), transit=limits.transit)
        placement = with_residency(
            self.start, self.other, memory, by="load", batch=len(options.prompts), expert_bytes=1.0
        )
        engine = serving.engine(limits, placement)
        difference = serving.difference(engine)
        served = serving.serve(engine, options.prompts, rounds=options.rounds)
        accuracy = _accuracy(self.group.counters.experts_foreseen)
        predicted = self.terms.predict(limits, placement, served, accuracy)
        figures = self._figures(served, predicted)
        return {
            "budget": budget, "fast_slots": limits.fast_slots, "policy": name,
            "residents": int((placement.tier_LER == 0).sum()),
            "experts": int(serving.checkpoint.experts_per_layer.sum()),
            **figures, "accuracy": accuracy, "logits_difference": difference,
        }  # fmt: skip

    def _figures(self, served: Served, predicted: TierEvaluation) -> dict[str, Any]:
        """What was measured beside what was predicted."""
        counts = [served.loaded, *(float(served.found.get(kind, 0)) for kind in USES)]
        everyone = self.serving.gather(counts)
        shares = dict(zip(USES, (everyone[1:] / max(everyone[1:].sum(), 1)).tolist(), strict=True))
        measured = served.seconds_per_step
        return {
            "seconds_per_step": measured,
            "seconds_without_tiers": served.pace,
            "predicted_seconds": predicted.seconds,
            "prediction_error": predicted.seconds / measured - 1,
            "hit_rate": sum(shares[kind] for kind in USES[:3]),
            "predicted_hit_rate": predicted.hit_rate,
            "belady_hit_rate": predicted.belady_hit_rate,
            "found": shares,
            "bytes_loaded": float(everyone[0]) / served.seconds_RS.size,
            "predicted_bytes": predicted.link_bytes,
        }

    def _sizes(self) -> np.ndarray:
        """Bytes of the experts that there are."""
        return self.serving.sizes_LE[self.serving.sizes_LE > 0]

    def document(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures with their conditions."""
        options, measured, plan = self.options, self.terms.measured, self.options.precision
        return {
            "conditions": {
                "benchmark": "offload", "model": str(options.model), "ranks": self.group.size,
                "batch": len(options.prompts),
                "steps": options.steps, "rounds": options.rounds, "mode": options.mode,
                "expert_bytes": int(self._sizes().max()), "mean_expert_bytes": float(self._sizes().mean()),
                "precision": "exact" if plan is None else plan.summary(),
                "latency": options.latency, "bandwidth": options.bandwidth,
                "transit": options.transit, "look_ahead": options.look_ahead, "host_computes": options.host_computes,
                "active_experts": count_demand(self.other, batch=len(options.prompts)).active_experts,
                **_costs(measured, float(self._sizes().mean())),
            },
            "without_tiers": {"seconds_per_step": self.base, "logits_difference": self.base_difference},
            "everything_resident": {"seconds_per_step": self.whole, "overhead": self.whole / self.base - 1},
            "runs": runs,
        }  # fmt: skip


def _costs(measured: Measured, size: float) -> dict[str, Any]:
    return {
        "seconds_outside_experts_per_layer": measured.outside_layer[0],
        "seconds_per_expert": measured.expert,
        "seconds_per_load": measured.load_of(size),
        "seconds_per_wait": measured.wake,
    }


def _accuracy(foreseen: Mapping[str, int]) -> float | None:
    """Share of activated experts that gates of earlier layers had named; None = nobody was asked."""
    return foreseen["named"] / foreseen["asked"] if foreseen.get("asked") else None
