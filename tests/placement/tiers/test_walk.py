"""The compiled walk against one that shares no code with it, on tiny instances; and what must hold on any."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import DISK, HOST, DiskTier, HostCompute, HostTier, Memory
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.tiers.evaluation import TierEvaluation, _largest, evaluate_tiers, mean_expert_bytes
from moeplace.placement.tiers.policy import POLICIES, Policy, Predictor
from moeplace.placement.tiers.rows import share_out
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace
from tests.placement.tiers.reference import Rank, walk_reference

BATCH, RANKS, SLOTS = 3, 2, 3
EXPERT = ExpertTime(fixed=2.0, per_token=0.25, per_activated=1.0)
OUTSIDE = 5.0
CALIBRATION = Calibration(
    intra=replace(Calibration().intra, latency=0.0, bandwidth=1e30), expert=EXPERT, other_seconds_per_layer=OUTSIDE
)
SHAPE = StepShape(batch=BATCH, hidden_size=1, kv_dim=0)


class Instance:
    """A tiny trace, a placement with random tiers, a memory with few rows."""

    def __init__(self, seed: int, *, host: bool, transit: int, tiers: bool = True, mixed: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.trace = skewed_trace(seed, tokens=33, layers=3, experts=5, top_k=2, ragged=0.1)
        if seed % 2:
            weights = draw.random(self.trace.topk_ids.shape).astype(np.float16)
            weights = -np.sort(-weights, axis=2)
            self.trace = replace(self.trace, topk_weights=np.where(self.trace.topk_ids < 0, 0, weights))
        compute = HostCompute(7.0, 1.5) if host else None
        self.memory = Memory(
            HostTier(bandwidth=0.1, latency=1.0, compute=compute, wake=0.5 * (seed % 2)), fast_slots=np.array([2, 3]),
            disk=DiskTier(0.2, 3.0), transit=transit, pieces=1 + seed % 4,
        )  # fmt: skip
        speed = np.array([1.0, 3.0])
        self.cluster = Cluster.uniform(RANKS, slots_per_rank=SLOTS).replace(memory=self.memory, speed_of_rank=speed)
        self.placement = index_order(np.full(3, 5), np.full(RANKS, SLOTS), np.zeros(RANKS, int))
        rows = np.stack([draw.permutation(row) for row in self.placement.slot_to_expert])
        self.placement = self.placement.replace(slot_to_expert=rows)
        if tiers:
            tier = draw.integers(HOST, DISK + 1, rows.shape)
            for rank in range(RANKS):
                spots = [(layer, slot) for layer in range(3) for slot in range(3 * rank, 3 * rank + 3)]
                for index in draw.permutation(len(spots))[: 2 + rank]:
                    tier[spots[index]] = 0
            self.placement = self.placement.replace(tier=tier)
        self.bytes_LE = draw.integers(1, 5, (3, 5)) / 4 if mixed else None

    def evaluate(self, policy: Policy) -> TierEvaluation:
        terms = TierTerms(self.cluster, SHAPE, mode="allgather", calibration=CALIBRATION, bytes_LE=self.bytes_LE)
        return evaluate_tiers(self.trace, self.placement, policy, terms)

    def reference(self, policy: Policy) -> tuple[float, dict[str, int]]:
        steps, rank_LE = self._steps(), self.placement.rank_of_expert
        predictor = policy.predictor

        def ahead(step: int, layer: int) -> list[tuple[int, int, int]]:
            named = []
            for target in range(layer + 1, min(layer + 1 + (predictor.depth if predictor else 0), 3)):
                counts = sorted((-tokens, e) for e, tokens in self._foreseen(predictor, step, target, layer).items())
                named += [(target, int(rank_LE[target, e]), e) for _, e in counts]
            return named

        ranks = [self._rank(index, policy) for index in range(RANKS)]
        seconds, uses = walk_reference(ranks, steps, [OUTSIDE] * 3, ahead)
        self.loads, self.carried = [rank.loads for rank in ranks], sum(rank.carried for rank in ranks)
        return seconds / len(steps), {kind: sum(each[kind] for each in uses) for kind in uses[0]}

    def _foreseen(self, predictor: Predictor | None, step: int, target: int, layer: int) -> dict[int, int]:
        """Expert -> tokens that the predictor names it for."""
        assert predictor is not None
        length, named, ahead = self.trace.num_tokens // BATCH, dict[int, int](), target - layer - 1
        for token in range(step, BATCH * length, length):
            for k, e in enumerate(np.asarray(self.trace.topk_ids)[token, target].tolist()):
                if e < 0:
                    continue
                place = (token, target * 64 + ahead, k)
                if (mixed(0, *place) >> 11) / 2.0**53 >= predictor.accuracy ** (ahead + 1):
                    other = mixed(1, *place) % 4
                    e = other + (other >= e)
                named[e] = named.get(e, 0) + 1
        return named

    def _rank(self, index: int, policy: Policy) -> Rank:
        tier_LE = self.placement.tier_LER[:, :, index]
        held = [(int(layer), int(e)) for layer, e in np.argwhere(tier_LE >= 0)]
        resident = {key for key in held if tier_LE[key] == 0}
        room = [2, 3][index] * 3 - self.memory.transit
        if self.placement.tier is None and len(resident) > room:
            resident = set()
        backed = [sum(key[0] == layer for key in held if key not in resident) for layer in range(3)]
        rows, left = [0, 0, 0], room - len(resident)
        while left and rows != backed:  # one after the other
            for layer in range(3):
                if left and rows[layer] < backed[layer]:
                    rows[layer] += 1
                    left -= 1
        if not policy.pins:
            rows = [n + sum(key[0] == layer for key in resident) for layer, n in enumerate(rows)]
        speed = self.cluster.speed_of_rank[index]
        host = self.memory.host.compute
        size = {key: 1.0 if self.bytes_LE is None else float(self.bytes_LE[key]) for key in held}
        return Rank(
            pinned=resident if policy.pins else set(),
            cached={} if policy.pins else dict.fromkeys(resident, 0.0),
            rows=rows,
            transit=[0.0] * self.memory.transit,
            speed=float(speed),
            terms={
                "fixed": EXPERT.fixed, "per_token": EXPERT.per_token, "per_activated": EXPERT.per_activated,
                "wake": self.memory.host.wake, "pieces": self.memory.pieces,
                "host": None if host is None else (host.per_expert, host.per_token),
            },
            eviction={"lookahead": "score", "pinned": "lru"}.get(policy.name, policy.name),
            load={
                key: 1.0 + 10.0 * size[key] + (3.0 + 5.0 * size[key] if tier_LE[key] == DISK else 0.0) for key in held
            },
            size=size,
            on_host={key for key in held if tier_LE[key] != DISK},
        )  # fmt: skip

    def _steps(self) -> list[list[dict[int, tuple[int, int, float]]]]:
        length = self.trace.num_tokens // BATCH
        ids, weights = np.asarray(self.trace.topk_ids), self.trace.topk_weights
        steps = []
        for step in range(length):
            layers: list[dict[int, tuple[int, int, float]]] = [{} for _ in range(3)]
            for token in range(step, BATCH * length, length):
                for layer, k in np.argwhere(ids[token] >= 0).tolist():
                    expert = int(ids[token, layer, k])
                    share = 1.0 if weights is None else float(weights[token, layer, k])
                    rank = int(self.placement.rank_of_expert[layer, expert])
                    _, tokens, weight = layers[layer].get(expert, (rank, 0, 0.0))
                    layers[layer][expert] = (rank, tokens + 1, weight + share)
            steps.append(layers)
        return steps


def mixed(seed: int, *numbers: int) -> int:
    """The finaliser of splitmix64 over all of them, by which the walk draws a predictor's errors."""
    a, *rest = numbers
    mask = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + a) & mask
    for add in (*rest, None):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        if add is not None:
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x = ((x ^ (x >> 31)) + add * 0x9E3779B97F4A7C15) & mask
    return x ^ (x >> 31)


def policies() -> list[Policy]:
    """Every policy, without predictor and with some: always right or often wrong, one and two layers ahead."""
    plain = [Policy(name) for name in POLICIES if name != "lookahead"]
    foresight = [Predictor(1.0), Predictor(1.0, 2), Predictor(0.5), Predictor(0.7, 2)]
    return plain + [Policy(name, predictor) for name in POLICIES for predictor in foresight]


@pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.label)
def test_the_walk_is_the_reference(policy: Policy, dated_seed: int) -> None:
    """Seconds, ways in which experts are found, loads and their bytes: with and without hosts that compute, few rows
    and many, experts of one size and of several."""
    for seed in (0, 1, 2, 3, dated_seed):
        for transit in (1, 2, 4):
            instance = Instance(seed, host=seed % 3 != 0, transit=transit, tiers=transit != 4, mixed=seed > 1)
            found = instance.evaluate(policy)
            seconds, uses = instance.reference(policy)
            total = sum(uses.values())
            assert {kind: round(share * total) for kind, share in found.shares.items()} == uses, (seed, transit)
            assert found.loads_LR.sum(axis=0).tolist() == instance.loads
            assert found.seconds == pytest.approx(seconds, rel=1e-9), (seed, transit)
            size = mean_expert_bytes(instance.trace) if instance.bytes_LE is None else 1.0
            assert found.link_bytes * found.steps / size == pytest.approx(instance.carried, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_without_foresight_beats_belady(seed: int, dated_seed: int) -> None:
    """Pinned, cached, evicted by any rule: what is found is at most what Belady's rule finds with one row more."""
    for each in (seed, dated_seed + seed):
        for policy in policies():
            if policy.predictor is None:
                found = Instance(each, host=False, transit=1).evaluate(policy)
                assert found.belady_hit_rate is not None
                assert found.hit_rate <= found.belady_hit_rate + 1e-12


@pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.label)
def test_with_room_for_everything_nothing_waits(policy: Policy) -> None:
    """The seconds are those of `evaluate` to the last digit that sums keep."""
    instance = Instance(1, host=True, transit=2)
    cluster = instance.cluster.replace(memory=replace(instance.memory, fast_slots=np.array([4, 4])))
    plain = instance.placement.replace(tier=None)
    options: dict[str, Any] = {"cluster": cluster, "mode": "allgather", "shape": SHAPE, "calibration": CALIBRATION}
    tiered = evaluate_tiers(instance.trace, plain, policy, TierTerms(**options))
    assert tiered.hit_rate == 1.0
    assert tiered.link_bytes == 0
    assert tiered.seconds == pytest.approx(evaluate(instance.trace, plain, **options).predicted_seconds, rel=1e-12)
    assert tiered.resident_seconds == pytest.approx(tiered.seconds, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_better_foresight_and_faster_links_cost_nothing(seed: int) -> None:
    """A link without delay waits for nothing; a predictor that is never right only loads in vain."""
    instance = Instance(seed, host=False, transit=3)
    quick = HostTier(bandwidth=1e30)
    cluster = instance.cluster.replace(memory=replace(instance.memory, host=quick, disk=DiskTier(1e30)))
    terms = TierTerms(cluster, SHAPE, mode="allgather", calibration=CALIBRATION)
    found = evaluate_tiers(instance.trace, instance.placement, Policy("lru"), terms)
    assert found.seconds == pytest.approx(found.resident_seconds)
    wrong = instance.evaluate(Policy("lookahead", Predictor(0.0)))
    right = instance.evaluate(Policy("lookahead", Predictor(1.0)))
    assert wrong.shares["prefetched"] + wrong.shares["late"] <= right.shares["prefetched"] + right.shares["late"]
    assert sum(wrong.shares.values()) == pytest.approx(1)


def test_what_cannot_be_priced_is_refused() -> None:
    """No tiers, too much resident, replicas whose choice follows moving tokens."""
    instance = Instance(0, host=False, transit=2)
    with pytest.raises(InputError, match="no memory tiers"):
        TierTerms(instance.cluster.replace(memory=None), SHAPE)
    tier = np.zeros((3, 6), int)
    tier[0, np.flatnonzero(instance.placement.slot_to_expert[0] >= 0)[0]] = HOST
    crowded = instance.placement.replace(tier=tier)
    with pytest.raises(InputError, match="rank 0 has 6 resident experts, its fast memory holds 4 and 2 in transit"):
        evaluate_tiers(instance.trace, crowded, Policy(), TierTerms(instance.cluster, SHAPE))
    twice = Placement(
        np.array([[0, 1, 1, 0]] * 2), np.array([2, 2]), np.zeros(2, int), np.array([2, 2]), tier=np.eye(2, 4, dtype=int)
    )
    trace = RoutingTrace(np.zeros((4, 2, 1), int), np.array([2, 2]))
    cluster = Cluster.uniform(2, slots_per_rank=2).replace(memory=instance.memory)
    with pytest.raises(InputError, match="not priced in mode coherent"):
        evaluate_tiers(trace, twice, Policy("lru"), TierTerms(cluster, SHAPE, mode="coherent"))
    few = TierTerms(instance.cluster, SHAPE, bytes_LE=np.ones((2, 5)))
    with pytest.raises(
        InputError, match=r"bytes of experts are for \(2, 5\) layers and experts, the placement for \(3, 5\)"
    ):
        evaluate_tiers(instance.trace, instance.placement, Policy(), few)
    with pytest.raises(InputError, match="policy lookahead needs a predictor"):
        Policy("lookahead")
    with pytest.raises(InputError, match=r"accuracy of a predictor \(1.5\)"):
        Predictor(1.5)


def test_memory_in_bytes_never_overflows_with_experts_of_several_sizes() -> None:
    """Rows are cut by the largest expert of each rank; smaller ones give room for more rows than the mean would not."""
    instance = Instance(2, host=False, transit=1)
    sizes = np.where(instance.placement.tier_LER[:, :, 0] >= 0, 8.0, 2.0)  # rank 0 has the large ones
    memory = Memory(instance.memory.host, fast_bytes=np.array([40.0, 40.0]), disk=instance.memory.disk, transit=1)
    rows = share_out(instance.placement.replace(tier=None), memory, Policy("lru"), expert_bytes=_largest(
        instance.placement, sizes
    ))  # fmt: skip
    small = int((instance.placement.tier_LER[:, :, 1] >= 0).sum())  # 20 rows hold all of these
    assert (rows.free_LR.sum(axis=0) + memory.transit).tolist() == [40 // 8, small + memory.transit]
