"""One rank's part of `moeplace bench offload`: engines with and without tiers, and servings of prompts that are timed.

Shape letters: R rounds, S decode steps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.policy import PolicyName
from moeplace.placement.tiers.precision import PrecisionPlan
from moeplace.placement.tiers.walk import USES
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.verification import plain_logits
from moeplace.runtime.engine.windows.rows import RoutedRows, join_rows
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.precisions.precision_checkpoint import PrecisionCheckpoint
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint

_CHECKED = 24
"""Tokens whose logits are compared."""


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
    rounds: int
    timeout: float
    placement: Placement | None = None
    precision: PrecisionPlan | None = None


@dataclass(frozen=True, eq=False)
class Served:
    """Decode steps, served several times over.

    Attributes:
        seconds_RS: of each step in each round.
        trace: their routing, which is the same in every round.
        found: experts of this rank by how they were found, over all rounds.
        loaded: bytes over all rounds; of what was broken off, the share that was loaded.
        pace: seconds of a step of the reference, served between the rounds: how fast the machine was meanwhile.
    """

    seconds_RS: np.ndarray
    trace: RoutingTrace
    found: dict[str, int]
    loaded: float
    pace: float

    @property
    def seconds_per_step(self) -> float:
        """Mean over steps of the median over rounds: what disturbs the machine now and then does not count."""
        return float(np.median(self.seconds_RS, axis=0).mean())


class Serving:
    """See the module.

    Attributes:
        options: what is run.
        group: the ranks.
        checkpoint: the model, exact or by a plan of precisions.
        sizes_LE: bytes of its experts.
        plain: logits that are to come out: those of the plain model, or of the plan's numbers in plain matrices.
        reference: an engine without tiers, served in turn with every other one; None = not yet.
    """

    def __init__(self, options: OffloadOptions, group: RankGroup) -> None:
        self.options, self.group = options, group
        plan = options.precision
        self.checkpoint = (
            Checkpoint(options.model) if plan is None else PrecisionCheckpoint(options.model, *plan.chosen)
        )
        self.sizes_LE = self.checkpoint.sizes(torch.float32)
        self.sequences = [prompt[:_CHECKED] for prompt in options.prompts[:2]]
        self.lengths = [max(len(prompt) - 4, 1) for prompt in self.sequences]
        self.plain = self._plain_logits()
        self.reference: Engine | None = None

    def _plain_logits(self) -> list[torch.Tensor]:
        options, plan = self.options, self.options.precision
        if plan is None:
            config = self.checkpoint.family.config
            return plain_logits(options.model, config, self.sequences, dtype=torch.float32)
        limits = EngineLimits(max_sequences=len(self.sequences), max_length=_CHECKED + 2)
        engine = Engine(
            RoundedCheckpoint(options.model, *plan.chosen), mode="allgather", dtype=torch.float32, limits=limits
        )
        return [logits.cpu() for logits in engine.score(self.sequences, prompt_lengths=self.lengths)]

    def limits(self, fast: int, name: PolicyName, *, look_ahead: int | None = None) -> TierLimits:
        """Of `fast` slots per layer; by default only `lookahead` looks ahead."""
        options = self.options
        ahead = (options.look_ahead if name == "lookahead" else 0) if look_ahead is None else look_ahead
        return TierLimits(
            fast, policy=name, look_ahead=ahead, transit=options.transit, host_computes=options.host_computes,
            latency=options.latency, bandwidth=options.bandwidth,
        )  # fmt: skip

    def engine(self, tiers: TierLimits | None, placement: Placement | None) -> Engine:
        """An engine for all prompts side by side."""
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

    def difference(self, engine: Engine) -> float:
        """Largest difference of a logit from `plain`, as a share of the largest logit."""
        ours = engine.score(self.sequences, prompt_lengths=self.lengths)
        return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(ours, self.plain, strict=True))

    def serve(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        *,
        rounds: int,
        restarted: Callable[[TieredStore], None] = lambda store: None,
    ) -> Served:
        """Decode all prompts side by side, in every round from the same fast memory.

        Args:
            engine: serves.
            prompts: what to begin with.
            rounds: how often.
            restarted: called before each round with the store, if it is a tiered one.
        """
        counters, experts = self.group.counters, engine.executor.runtime.experts
        found: dict[str, int] = {}
        seconds, loaded, paces = [], 0.0, [np.nan]
        for _ in range(rounds):
            if self.reference is not None:
                self._begin(self.reference, self.options.prompts)
                paces.append(statistics.median(_timed_steps(self.reference)))
            if isinstance(experts, TieredStore):
                experts.restart(engine.placement, self.group.rank)
                restarted(experts)
            self._begin(engine, prompts)
            before = loaded_by(engine)
            seconds.append(_timed_steps(engine))
            loaded += loaded_by(engine) - before
            found = {kind: found.get(kind, 0) + counters.experts_found.get(kind, 0) for kind in USES}
        pace = float(np.nanmedian(paces)) if paces[1:] else np.nan
        return Served(np.array(seconds), self.routing(engine), found, loaded, pace)

    def routing(self, engine: Engine) -> RoutingTrace:
        """What an engine has routed since its window was cleared, of all ranks; sequences are known by `crc32` of their
        requests' names.
        """
        assert engine.window.recent is not None
        content = engine.window.recent.snapshot().to_bytes()
        parts = [RoutedRows.from_bytes(each) for each in self.group.all_gather_bytes(content, kind="routing")]
        return join_rows(parts, self.checkpoint.experts_per_layer, layer_ids=self.checkpoint.layer_ids)

    def alternate(self, one: Engine, other: Engine) -> tuple[float, float]:
        """Seconds of a step of two engines, in turn: what disturbs the machine disturbs both."""
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.options.rounds):
            for engine in (one, other):
                self._begin(engine, self.options.prompts)
            while not one.scheduler.is_idle:
                for engine, noted in zip((one, other), seconds, strict=True):
                    began = time.perf_counter()
                    engine.step()
                    noted.append(time.perf_counter() - began)
        return statistics.median(seconds[0]), statistics.median(seconds[1])

    def gather(self, numbers: list[float]) -> np.ndarray:
        """Sums over ranks."""
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.group.device)
        if self.group.size > 1:
            self.group.all_reduce(shared, kind="figures")
        return np.asarray(shared.cpu().numpy())

    def mean(self, number: float) -> float:
        """Mean over ranks."""
        return float(self.gather([number])[0]) / self.group.size

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


def store_of(engine: Engine) -> TieredStore:
    """The tiered store of an engine that has one."""
    store = engine.executor.runtime.experts
    assert isinstance(store, TieredStore)
    return store


def _timed_steps(engine: Engine) -> list[float]:
    seconds = []
    while not engine.scheduler.is_idle:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def loaded_by(engine: Engine) -> float:
    """Bytes of experts that an engine has loaded so far; of what was broken off, the share that was loaded."""
    store = engine.executor.runtime.experts
    return store.loader.bytes + store.loader.broken_bytes if isinstance(store, TieredStore) else 0.0
