"""`moeplace bench offload`: a checkpoint served with less fast memory than its experts take, measured and predicted.

1. Without tiers: the reference of time, the routing of other prompts for residency by load.
2. Everything in fast memory, through the tiered store: what the store itself costs; then expert by expert, and single
   loads: what prediction needs.
3. Budgets x policies, each with its logits against the plain model's, its counts, and the walk of the routing it had.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HostCompute, HostTier, Memory
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.evaluation import evaluate_tiers
from moeplace.placement.tiers.policy import Policy, PolicyName, Predictor
from moeplace.placement.tiers.residency import with_residency
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.routing_window import RoutedRows, join_rows
from moeplace.runtime.engine.verification import plain_logits
from moeplace.runtime.experts.loader import Load
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_computation import TieredComputation
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.models.checkpoint import Checkpoint

_CHECKED, _LOADS = 24, 9
"""Tokens whose logits are compared; loads that are timed."""


@dataclass(frozen=True)
class OffloadOptions:
    """See `moeplace bench offload --help`."""

    model: Path
    prompts: tuple[tuple[int, ...], ...]
    other_prompts: tuple[tuple[int, ...], ...]
    budgets: tuple[float, ...]
    policies: tuple[PolicyName, ...]
    look_ahead: int
    transit: int
    host_computes: bool
    latency: float
    bandwidth: float | None
    mode: Mode
    steps: int
    timeout: float
    placement: Placement | None = None


@dataclass(frozen=True, eq=False)
class _Measured:
    """What prediction needs; seconds."""

    outside_layer: float
    expert: float
    load: float


class _Served(NamedTuple):
    """Decode steps: their seconds, their routing, how experts were found, how many were loaded."""

    seconds: list[float]
    trace: RoutingTrace
    found: dict[str, int]
    loads: int


def offload_bench(
    options: OffloadOptions, *, report: Callable[[float], None] = lambda share: None
) -> dict[str, Any] | None:
    """Run it on the ranks of this group; the figures, on rank 0.

    Raises:
        InputError: a budget does not hold the rows for transit.
    """
    torch.set_num_threads(1)
    group = RankGroup.from_environment(timeout=options.timeout, device=None)
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
        self.checkpoint = Checkpoint(options.model)
        self.plain: list[torch.Tensor] = []

    def prepare(self) -> None:
        """Steps 1 and 2."""
        options = self.options
        self.base = self._engine(None, options.placement)
        self.start = self.base.placement
        self._check_logits_of_plain_model()
        self.other = self._serve(self.base, options.other_prompts).trace
        self.slots = int(self.start.slots_of_rank.max())
        whole = self._engine(self._limits(self.slots + 1, "pinned"), self.start)
        self.base_seconds, self.whole_seconds = self._alternate(self.base, whole)
        self.measured = self._calibrate()

    def run(self, budget: float, name: PolicyName) -> dict[str, Any]:
        """Step 3, for one budget (share of all experts) and policy."""
        options = self.options
        fast = max(round(budget * self.slots), 1)
        limits = self._limits(fast, name)
        size = self._expert_bytes()
        memory = Memory(HostTier(1.0), fast_slots=np.full(self.group.size, fast), transit=limits.transit)
        placement = with_residency(
            self.start, self.other, memory, by="load", batch=len(options.prompts), expert_bytes=1.0
        )
        engine = self._engine(limits, placement)
        difference = self._difference(engine)
        served = self._serve(engine, options.prompts)
        seconds, accuracy = served.seconds, _accuracy(self.group.counters.experts_foreseen)
        predicted = self._predict(limits, placement, served.trace, accuracy)
        everyone = self._gather([float(served.loads), *(float(served.found.get(kind, 0)) for kind in _KINDS)])
        shares = dict(zip(_KINDS, everyone[1:] / max(everyone[1:].sum(), 1), strict=True))
        measured = statistics.fmean(seconds)
        return {
            "budget": budget,
            "fast_slots": fast,
            "policy": name,
            "residents": int((placement.tier_LER == 0).sum()),
            "experts": int(self.checkpoint.experts_per_layer.sum()),
            "seconds_per_step": measured,
            "predicted_seconds": predicted.seconds,
            "prediction_error": predicted.seconds / measured - 1,
            "hit_rate": sum(shares[kind] for kind in _KINDS[:3]),
            "predicted_hit_rate": predicted.hit_rate,
            "belady_hit_rate": predicted.belady_hit_rate,
            "found": shares,
            "bytes_loaded": float(everyone[0]) * size / len(seconds),
            "predicted_bytes": predicted.link_bytes * size,
            "accuracy": accuracy,
            "logits_difference": difference,
        }

    def document(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures with their conditions."""
        options, base = self.options, statistics.median(self.base_seconds)
        return {
            "conditions": {
                "model": str(options.model), "ranks": self.group.size, "batch": len(options.prompts),
                "steps": options.steps, "mode": options.mode, "expert_bytes": self._expert_bytes(),
                "latency": options.latency, "bandwidth": options.bandwidth, "transit": options.transit,
                "look_ahead": options.look_ahead, "host_computes": options.host_computes,
                "seconds_outside_experts_per_layer": self.measured.outside_layer,
                "seconds_per_expert": self.measured.expert, "seconds_per_load": self.measured.load,
            },
            "without_tiers": {"seconds_per_step": base, "logits_difference": self.base_difference},
            "everything_resident": {
                "seconds_per_step": statistics.median(self.whole_seconds),
                "overhead": statistics.median(self.whole_seconds) / base - 1,
            },
            "runs": runs,
        }  # fmt: skip

    def _limits(self, fast: int, name: PolicyName) -> TierLimits:
        options = self.options
        return TierLimits(
            fast, policy=name, look_ahead=options.look_ahead if name == "lookahead" else 0, transit=options.transit,
            host_computes=options.host_computes, latency=options.latency, bandwidth=options.bandwidth,
        )  # fmt: skip

    def _engine(self, tiers: TierLimits | None, placement: Placement | None) -> Engine:
        options = self.options
        longest = max(map(len, (*options.prompts, *options.other_prompts)))
        batch = len(options.prompts)
        limits = EngineLimits(
            max_sequences=max(batch, self.group.size), max_length=longest + options.steps + 2,
            max_prefill_tokens=longest * batch, recent_ids=2 * batch * (longest + options.steps), tiers=tiers,
        )  # fmt: skip
        return Engine(
            self.checkpoint, placement, mode=options.mode, group=self.group, dtype=torch.float32, limits=limits,
            node_aware=False,
        )  # fmt: skip

    def _check_logits_of_plain_model(self) -> None:
        sequences = [prompt[:_CHECKED] for prompt in self.options.prompts[:2]]
        self.sequences, self.lengths = sequences, [max(len(prompt) - 4, 1) for prompt in sequences]
        self.plain = plain_logits(self.options.model, self.checkpoint.family.config, sequences, dtype=torch.float32)
        self.base_difference = self._difference(self.base)

    def _difference(self, engine: Engine) -> float:
        """Largest difference of a logit from the plain model's, as a share of the largest logit."""
        ours = engine.score(self.sequences, prompt_lengths=self.lengths)
        return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(ours, self.plain, strict=True))

    def _serve(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> "_Served":
        """Decode all prompts side by side."""
        self._begin(engine, prompts)
        loads, seconds = _loads(engine), []
        while not engine.scheduler.is_idle:
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
        found = dict(self.group.counters.experts_found)
        assert engine.window.recent is not None
        content = engine.window.recent.snapshot().to_bytes()
        parts = [RoutedRows.from_bytes(each) for each in self.group.all_gather_bytes(content, kind="routing")]
        trace = join_rows(parts, self.checkpoint.experts_per_layer, layer_ids=self.checkpoint.layer_ids)
        return _Served(seconds, trace, found, _loads(engine) - loads)

    def _begin(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill, and the first step; from then on counts and routing are of decode steps alone."""
        for number, prompt in enumerate(prompts):
            engine.add_request(Request(f"{number}", tuple(prompt), max_new_tokens=self.options.steps + 2, stop_ids=()))
        engine.step()
        engine.step()
        assert engine.window.recent is not None
        engine.window.recent.restart()
        self.group.counters.experts_found.clear()
        self.group.counters.experts_foreseen.clear()

    def _alternate(self, one: Engine, other: Engine) -> tuple[list[float], list[float]]:
        """Seconds of the steps of two engines, in turn: what disturbs the machine disturbs both."""
        for engine in (one, other):
            self._begin(engine, self.options.prompts)
        seconds: tuple[list[float], list[float]] = ([], [])
        while not one.scheduler.is_idle:
            for engine, noted in zip((one, other), seconds, strict=True):
                began = time.perf_counter()
                engine.step()
                noted.append(time.perf_counter() - began)
        return seconds

    def _calibrate(self) -> _Measured:
        """Everything in fast memory, but computed expert by expert; and loads by themselves."""
        engine = self._engine(self._limits(self.slots + 1, "pinned"), self.start)
        store = _store(engine)
        store.take_apart()
        served = self._serve(engine, self.options.prompts)
        computation = engine.executor.runtime.computation
        assert isinstance(computation, TieredComputation)
        expert = float(self._gather([computation.device_seconds])[0]) / self.group.size
        layers, shape = self.checkpoint.num_layers, StepShape(batch=len(self.options.prompts), hidden_size=1, kv_dim=0)
        alone = self._terms(_Measured(0.0, expert, 0.0), None)
        memory = Memory(HostTier(1.0), fast_slots=np.full(self.group.size, self.slots + 1), transit=1)
        computing = evaluate_tiers(
            served.trace, self.start, Policy(), cluster=alone[0].replace(memory=memory), mode=self.options.mode,
            shape=shape, calibration=alone[1],
        ).seconds  # fmt: skip
        outside = max(statistics.median(served.seconds) - computing, 0.0) / layers
        took = statistics.median(_seconds_of_a_load(store) for _ in range(_LOADS))
        return _Measured(outside, expert, float(self._gather([took])[0]) / self.group.size)

    def _terms(self, measured: _Measured, memory: Memory | None) -> tuple[Cluster, Calibration]:
        """Cluster and calibration in which exchanges are part of what a layer costs beside its experts."""
        silent = Link(latency=0.0, bandwidth=1e30)
        slots = self.start.slots_of_rank.tolist()
        cluster = Cluster.uniform(self.group.size, slots_per_rank=slots, intra=silent).replace(memory=memory)
        return cluster, Calibration(
            intra=silent, expert=ExpertTime(0.0, 0.0, measured.expert), other_seconds_per_layer=measured.outside_layer
        )

    def _predict(self, limits: TierLimits, placement: Placement, trace: RoutingTrace, accuracy: float | None) -> Any:
        compute = HostCompute(0.0, self.measured.expert) if limits.host_computes else None
        ranks = self.group.size
        memory = Memory(
            HostTier(1 / self.measured.load, compute=compute), fast_slots=np.full(ranks, limits.fast_slots),
            transit=limits.transit,
        )  # fmt: skip
        cluster, calibration = self._terms(self.measured, memory)
        predictor = None if accuracy is None else Predictor(accuracy, limits.look_ahead)
        return evaluate_tiers(
            trace, placement, Policy(limits.policy, predictor), cluster=cluster, mode=self.options.mode,
            shape=StepShape(batch=len(self.options.prompts), hidden_size=1, kv_dim=0), calibration=calibration,
        )  # fmt: skip

    def _expert_bytes(self) -> int:
        return self.base.executor.runtime.experts.expert_bytes(0)

    def _gather(self, numbers: list[float]) -> np.ndarray:
        """Sums over ranks."""
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.group.device)
        if self.group.size > 1:
            self.group.all_reduce(shared, kind="figures")
        return np.asarray(shared.cpu().numpy())


_KINDS = ("resident", "cached", "prefetched", "late", "host", "loaded")


def _store(engine: Engine) -> TieredStore:
    store = engine.executor.runtime.experts
    assert isinstance(store, TieredStore)
    return store


def _seconds_of_a_load(store: TieredStore) -> float:
    """From the request until the waiting thread goes on."""
    load = Load(0, 0, target=0)
    began = time.perf_counter()
    store.loader.ask(load)
    load.done.wait()
    return time.perf_counter() - began


def _loads(engine: Engine) -> int:
    """Experts that an engine has loaded so far."""
    store = engine.executor.runtime.experts
    return store.loader.loads if isinstance(store, TieredStore) else 0


def _accuracy(foreseen: Mapping[str, int]) -> float | None:
    """Share of activated experts that gates of earlier layers had named; None = nobody was asked."""
    return foreseen["named"] / foreseen["asked"] if foreseen.get("asked") else None


def budgets_of(text: str) -> tuple[float, ...]:
    """Shares of all experts from a list of percentages.

    Raises:
        InputError: one does not lie in 0..100.
    """
    shares = []
    for word in text.split(","):
        try:
            share = float(word.strip().rstrip("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise InputError(f"budget {word.strip()!r} must be a percentage above 0 and up to 100")
        shares.append(share)
    return tuple(shares)
