"""What `moeplace bench offload` predicts by: costs that are measured apart from the runs they are to predict.

an expert, a layer beside its experts    all experts in fast memory, but computed one by one
a load                                   loads by themselves, one behind the other: of the largest expert and of the
                                         smallest, and from them what a byte takes
a wait                                   other prompts, as little fast memory as there can be: what a step took
                                         longer than its walk, over the waits it had. Who waits has to be woken,
                                         and goes on with cold caches.

Machines get faster and slower while others use them. So steps without tiers are served in turn with everything else,
and what was measured is scaled by how long they took then and take now. Loads are not: an emulated link keeps its pace.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeplace.launch.benches.offload_serving import Served, Serving, store_of
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HostCompute, HostTier, Memory
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.evaluation import TierEvaluation, evaluate_tiers
from moeplace.placement.tiers.policy import Policy, Predictor
from moeplace.placement.tiers.terms import TierTerms
from moeplace.runtime.experts.loader import Load
from moeplace.runtime.experts.row_contents import NOTHING
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_computation import TieredComputation
from moeplace.runtime.experts.tiered_store import TieredStore

_LOADS = 9
"""Loads that are timed."""
_SILENT = Link(latency=0.0, bandwidth=1e30)


@dataclass(frozen=True)
class Measured:
    """Seconds.

    Attributes:
        outside_layer: of a layer beside its experts, exchanges included, by layers looked ahead.
        expert: of computing one.
        load: of the link with one, whatever it carries.
        load_byte: of the link with a byte of one.
        wake: lost beside a wait.
        pace: of a step without tiers while this was measured.
    """

    outside_layer: Mapping[int, float]
    expert: float
    load: float
    load_byte: float
    wake: float = 0.0
    pace: float = 1.0

    def at(self, pace: float) -> "Measured":
        """The same on a machine that takes `pace` for a step without tiers; loads stay."""
        share = pace / self.pace
        outside = {ahead: seconds * share for ahead, seconds in self.outside_layer.items()}
        return Measured(outside, self.expert * share, self.load, self.load_byte, self.wake * share, pace)

    def load_of(self, size: float) -> float:
        """Of the link with an expert of so many bytes."""
        return self.load + self.load_byte * size


@dataclass(frozen=True, eq=False)
class Terms:
    """What is measured, and the placement's shape.

    Attributes:
        serving: whose steps are predicted.
        start: a placement.
        measured: costs.
    """

    serving: Serving
    start: Placement
    measured: Measured

    @classmethod
    def measure(cls, serving: Serving, start: Placement, *, slots: int) -> "Terms":
        """Measure on this group; `slots`: the most of a rank per layer."""
        options = serving.options
        measured = Measured({}, 0.0, 0.0, 0.0)
        for ahead in sorted({0, options.look_ahead if "lookahead" in options.policies else 0}):
            limits = serving.limits(slots + 1, "pinned", look_ahead=ahead)
            engine = serving.engine(limits, start)
            served = serving.serve(
                engine, options.prompts, rounds=options.rounds, restarted=lambda store: store.take_apart()
            )
            computation = engine.executor.runtime.computation
            assert isinstance(computation, TieredComputation)
            if not ahead:
                load, load_byte = map(serving.mean, _seconds_of_loads(store_of(engine)))
                measured = Measured({}, serving.mean(computation.device_seconds), load, load_byte, pace=served.pace)
            now = measured.at(served.pace)
            alone = cls(serving, start, replace(now, outside_layer={ahead: 0.0}, load=0.0, load_byte=0.0))
            computing = alone.predict(limits, start, served, None).seconds
            outside = max(served.seconds_per_step - computing, 0.0) / start.num_layers
            measured = replace(now, outside_layer={**now.outside_layer, ahead: outside}).at(measured.pace)
        return cls(serving, start, cls(serving, start, measured)._with_wake())

    def _with_wake(self) -> Measured:
        """What is lost beside a wait: how much more than its walk a step takes, over the waits it has."""
        serving = self.serving
        limits = serving.limits(serving.options.transit // self.start.num_layers + 1, "lru")
        served = serving.serve(
            serving.engine(limits, self.start), serving.options.other_prompts, rounds=serving.options.rounds
        )
        without = self.predict(limits, self.start, served, None).seconds
        now = self.measured.at(served.pace)
        small = 0.1 * now.load_of(float(self.serving.sizes_LE.max()))
        slower = replace(self, measured=replace(now, wake=small))
        waits = (slower.predict(limits, self.start, served, None).seconds - without) / small if small else 0.0
        wake = serving.mean(max(served.seconds_per_step - without, 0.0) / waits) if waits else 0.0
        return replace(now, wake=wake).at(self.measured.pace)

    def predict(
        self, limits: TierLimits, placement: Placement, served: Served, accuracy: float | None
    ) -> TierEvaluation:
        """Walk the routing of a run; exchanges are part of what a layer costs beside its experts.

        Of the run itself nothing is used but its routing, and how fast the machine was beside it.
        """
        measured, ranks = self.measured.at(served.pace), placement.num_ranks
        compute = HostCompute(0.0, measured.expert) if limits.host_computes else None
        bandwidth = 1 / measured.load_byte if measured.load_byte else 1e30
        host = HostTier(bandwidth, measured.load, compute=compute, wake=measured.wake)
        memory = Memory(
            host, fast_slots=np.full(ranks, limits.fast_slots),
            transit=limits.transit,
        )  # fmt: skip
        cluster = Cluster.uniform(ranks, slots_per_rank=placement.slots_of_rank.tolist(), intra=_SILENT)
        calibration = Calibration(
            intra=_SILENT, expert=ExpertTime(0.0, 0.0, measured.expert),
            other_seconds_per_layer=measured.outside_layer[limits.look_ahead],
        )  # fmt: skip
        predictor = None if accuracy is None else Predictor(accuracy, limits.look_ahead)
        options = self.serving.options
        shape = StepShape(batch=len(options.prompts), hidden_size=1, kv_dim=0)
        terms = TierTerms(
            cluster.replace(memory=memory), shape, mode=options.mode, calibration=calibration,
            bytes_LE=self.serving.sizes_LE,
        )  # fmt: skip
        return evaluate_tiers(served.trace, placement, Policy(limits.policy, predictor), terms)


def _seconds_of_loads(store: TieredStore) -> tuple[float, float]:
    """Of a load whatever it carries, and of a byte of it; all of it is the byte's where experts have one size."""
    rows = [(layer, row) for layer in range(len(store.weights)) for row in range(store.host_rows(layer))]
    held = [spot for spot in rows if store.contents.expert_of_row[spot[0]][spot[1]] != NOTHING]
    small, large = (pick(held, key=lambda spot: store.bytes_in_row(*spot)) for pick in (min, max))
    least, most = store.bytes_in_row(*small), store.bytes_in_row(*large)
    longest = _seconds_of_a_load(store, *large)
    if least == most:
        return 0.0, longest / most
    per_byte = max(longest - _seconds_of_a_load(store, *small), 0.0) / (most - least)
    return max(longest - per_byte * most, 0.0), per_byte


def _seconds_of_a_load(store: TieredStore, layer: int, row: int) -> float:
    """Of loads that are asked for together, one behind the other."""
    loads = [Load(layer, row, target=0) for _ in range(_LOADS + 1)]
    for load in loads:
        store.loader.ask(load)
    loads[0].done.wait()
    began = time.perf_counter()
    loads[-1].done.wait()
    return (time.perf_counter() - began) / _LOADS
