"""`moeplace bench offload --alike`: more requests than places, let in as they come and alike ones first, side by side.

All requests wait when a serving begins, in drawn order; each wants a drawn number of tokens, so places come free one by
one. For every budget and policy the same requests are served with every N (`EngineLimits.alike`), each time from the
same fast memory. What is counted is exact whatever else the machine does (but for what is fetched ahead); seconds are
not. Numbers are float64: in narrower ones a sum over another batch may round otherwise, and draw another token.

Shape letters: G requests, L MoE layers, E experts per layer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch

from moeplace.launch.benches.offload_serving import OffloadOptions, Serving, loaded_by
from moeplace.placement.memory import HostTier, Memory
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.likeness import likeness, unit_profile
from moeplace.placement.tiers.policy import PolicyName
from moeplace.placement.tiers.residency import with_residency
from moeplace.placement.tiers.walk import USES
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.admission.forecast import ExpertForecast
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore


@dataclass(frozen=True)
class AlikeOptions:
    """Beside `OffloadOptions`, whose prompts are those of all requests and whose steps are the most tokens of one.

    Attributes:
        overtaken: N of each serving, the first is compared with.
        places: sequences in the batch.
        temperature: of sampling.
        seed: of the drawn order, lengths and tokens.
    """

    overtaken: tuple[int, ...]
    places: int
    temperature: float
    seed: int


@dataclass
class _Served:
    """One serving of all requests.

    Attributes:
        tokens: by request.
        begun: pass that gave each request its first token.
        passes: how many there were.
        active: experts of a layer that were asked for, of every pass in which all places ran single tokens.
        loaded: bytes.
        found: experts by how they were found.
        seconds: in all.
    """

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    active: list[float] = field(default_factory=list)
    loaded: float = 0.0
    found: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def alike_bench(
    options: OffloadOptions, alike: AlikeOptions, *, report: Callable[[float], None] = lambda share: None
) -> dict[str, Any] | None:
    """Run it on the ranks of this group; the figures, on rank 0.

    Raises:
        InputError: a budget does not hold the rows for transit, or the model cannot forecast its experts.
    """
    torch.set_num_threads(1)
    group = RankGroup.from_environment(timeout=options.timeout)
    bench = _Bench(options, alike, group)
    bench.prepare()
    runs: list[dict[str, Any]] = []
    pieces = [(budget, policy) for budget in options.budgets for policy in options.policies]
    for done, (budget, policy) in enumerate(pieces):
        report((done + 1) / (len(pieces) + 1))
        runs += bench.run(budget, policy)
    return bench.document(runs) if group.rank == 0 else None


class _Bench:
    """One rank's part."""

    def __init__(self, options: OffloadOptions, alike: AlikeOptions, group: RankGroup) -> None:
        self.options, self.alike, self.group = options, alike, group
        self.serving = Serving(options, group)
        draw = np.random.default_rng(alike.seed)
        prompts = [options.prompts[index] for index in draw.permutation(len(options.prompts))]
        self.requests = self._requests(prompts, draw)
        self.others = self._requests(options.other_prompts, draw)

    def _requests(self, prompts: Sequence[Sequence[int]], draw: np.random.Generator) -> list[Request]:
        most, temperature = self.options.steps, self.alike.temperature
        lengths = draw.integers(max(most // 4, 2), most + 1, len(prompts)).tolist()
        return [
            Request(str(n), tuple(prompt), length, SamplingParameters(temperature, seed=n), stop_ids=())
            for n, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def engine(self, tiers: TierLimits | None, placement: Placement | None, overtaken: int) -> Engine:
        """An engine with fewer places than there are requests."""
        longest = max(len(request.token_ids) for request in (*self.requests, *self.others))
        limits = EngineLimits(
            max_sequences=self.alike.places, max_length=longest + self.options.steps + 2, reuses_prefixes=False,
            recent_ids=sum(request.length_limit for request in self.requests), tiers=tiers, alike=overtaken,
        )  # fmt: skip
        return Engine(
            self.serving.checkpoint, placement, mode=self.options.mode, group=self.group, dtype=torch.float64,
            limits=limits, node_aware=False,
        )  # fmt: skip

    def prepare(self) -> None:
        """Without tiers: the tokens that all servings must give, and the routing of other requests for residency."""
        base = self.engine(None, self.options.placement, max(self.alike.overtaken))
        self.start = base.placement
        self.slots = int(self.start.slots_of_rank.max())
        self.expected = self._serve(base, self.requests).tokens
        self.correlation = self._correlation(base, self.serving.routing(base))
        self._serve(base, self.others)
        self.other = self.serving.routing(base)

    def _correlation(self, engine: Engine, trace: RoutingTrace) -> float:
        """Over pairs of requests: likeness of forecasts, and of what the tokens behind the prompts asked for."""
        assert isinstance(engine.executor, Executor), "others were refused"
        forecast = ExpertForecast(engine.executor.decoder, trace.num_experts)
        sequence_T = np.asarray(trace.sequence_ids)
        foreseen, asked = [], []
        for request in self.requests:
            tokens = np.flatnonzero(sequence_T == crc32(request.request_id.encode()))[len(request.token_ids) :]
            asked.append(unit_profile(_counts(np.asarray(trace.topk_ids)[tokens], trace.num_experts)))
            foreseen.append(unit_profile(forecast.count(request.token_ids)))
        pairs = np.triu_indices(len(self.requests), 1)
        one, other = (likeness(np.stack(each), np.stack(each))[pairs] for each in (foreseen, asked))
        return float(np.corrcoef(one, other)[0, 1])

    def run(self, budget: float, name: PolicyName) -> list[dict[str, Any]]:
        """One budget (share of all experts) and policy, with every N."""
        limits = self.serving.limits(max(round(budget * self.slots), 1), name)
        memory = Memory(HostTier(1.0), fast_slots=np.full(self.group.size, limits.fast_slots), transit=limits.transit)
        placement = with_residency(self.start, self.other, memory, by="load", batch=self.alike.places, expert_bytes=1.0)
        runs: list[dict[str, Any]] = []
        first: _Served | None = None
        for overtaken in self.alike.overtaken:
            engine = self.engine(limits, placement, overtaken)
            rounds = [self._serve(engine, self.requests) for _ in range(self.options.rounds)]
            first = first or rounds[0]
            labels = {"budget": budget, "fast_slots": limits.fast_slots, "policy": name, "overtaken": overtaken}
            runs.append({**labels, **self._figures(rounds, first)})
            runs[-1]["bytes_share"] = runs[-1]["bytes_loaded"] / max(runs[0]["bytes_loaded"], 1.0)
        return runs

    def _serve(self, engine: Engine, requests: Sequence[Request]) -> _Served:
        counters, experts, served = self.group.counters, engine.executor.runtime.experts, _Served()
        if isinstance(experts, TieredStore):
            experts.restart(engine.placement, self.group.rank)
        assert engine.window.recent is not None
        engine.window.recent.restart()
        counters.experts_found.clear()
        before, began = loaded_by(engine), time.perf_counter()
        for request in requests:
            engine.add_request(request)
        while not engine.scheduler.is_idle:
            self._step(engine, served)
        served.seconds, served.loaded = time.perf_counter() - began, loaded_by(engine) - before
        served.found = {kind: counters.experts_found.get(kind, 0) for kind in USES}
        return served

    def _step(self, engine: Engine, served: _Served) -> None:
        counters = self.group.counters
        before = counters.activated.total()
        stepped = engine.step_with_note(0)
        engine.flush_counts()
        for name, _, _ in stepped.drawn:
            served.begun.setdefault(name, served.passes)
        if stepped.phase == "decode" and len(stepped.drawn) == self.alike.places:
            served.active.append((counters.activated.total() - before) / engine.checkpoint.num_layers)
        served.tokens.update({done.request_id: done.token_ids for done in stepped.completions})
        served.passes += 1

    def _figures(self, rounds: Sequence[_Served], first: _Served) -> dict[str, Any]:
        """Of the rounds of one N, beside a round of the first N."""
        served = rounds[0]
        counts = [float(np.mean([one.loaded for one in rounds])), float(np.mean(served.active or [0.0]))]
        everyone = self.serving.gather([*counts, *(float(served.found[kind]) for kind in USES)])
        begun = np.array([served.begun[request.request_id] for request in self.requests])
        usual = np.array([first.begun[request.request_id] for request in self.requests])
        return {
            "passes": served.passes,
            "active_experts": float(everyone[1]),
            "experts_asked": int(everyone[2:].sum()),
            "hit_rate": float(everyone[2:5].sum() / max(everyone[2:].sum(), 1.0)),
            "bytes_loaded": float(everyone[0]),
            "bytes_per_token": float(everyone[0]) / sum(map(len, served.tokens.values())),
            "seconds": float(np.median([one.seconds for one in rounds])),
            "mean_wait": float(begun.mean()),
            "longest_delay": int((begun - usual).max()),
            "most_overtaken": _most_overtaken(begun),
            "other_tokens": sum(served.tokens[name] != tokens for name, tokens in self.expected.items()),
        }

    def document(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures with their conditions."""
        options, plan = self.options, self.options.precision
        return {
            "conditions": {
                "benchmark": "offload --alike", "model": str(options.model), "ranks": self.group.size,
                "requests": len(self.requests), "prompt": len(self.requests[0].token_ids), "most_tokens": options.steps,
                **asdict(self.alike), "rounds": options.rounds, "mode": options.mode,
                "experts": int(self.serving.checkpoint.experts_per_layer.sum()),
                "expert_bytes": int(self.serving.checkpoint.sizes(torch.float64).max()),
                "precision": "exact" if plan is None else plan.summary(),
                "latency": options.latency, "bandwidth": options.bandwidth,
                "transit": options.transit, "look_ahead": options.look_ahead, "host_computes": options.host_computes,
            },
            "forecast_correlation": self.correlation,
            "runs": runs,
        }  # fmt: skip


def _counts(ids_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """(L, E) how often each expert was chosen."""
    layers = ids_TLK.swapaxes(0, 1).reshape(ids_TLK.shape[1], -1)
    return np.stack([np.bincount(ids[ids >= 0], minlength=num_experts) for ids in layers])


def _most_overtaken(begun_G: np.ndarray) -> int:
    """Of all requests, in the order in which they came: most later ones that began in an earlier pass."""
    return max(int((begun_G[index + 1 :] < number).sum()) for index, number in enumerate(begun_G.tolist()))
