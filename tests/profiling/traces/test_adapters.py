"""Several adapters over one base: (layer, expert, adapter) as experts, and traces in another mix."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.placement import index_order
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.adapters import separate_adapters, used_by_adapters
from moeplace.profiling.traces.mix import mix, parse_mix
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace, concatenate
from tests.profiling.builders import random_ids


def tagged(seed: int = 0, *, tokens: int = 240) -> RoutingTrace:
    """Unequal layers, a null expert, ragged rows, two adapters by sequence, one of which knows few experts."""
    rng = np.random.default_rng(seed)
    ids_TLK = random_ids(rng, tokens, 2, 5, 2)  # layer 0 has 4 experts and id 4 is null; layer 1 has 3 and id 3 is null
    ids_TLK[:, 1] = np.argsort(rng.random((tokens, 4)), axis=1)[:, :2]
    ids_TLK[rng.random(tokens) < 0.2, :, 1] = -1
    sequence_T = np.arange(tokens) // 8
    adapter_T = np.array([-1, 0, 1, 1])[sequence_T % 4]
    few = np.flatnonzero(adapter_T == 0)
    ids_TLK[few, 0] = np.array([2, 4])
    return RoutingTrace(
        ids_TLK,
        np.array([4, 3]),
        sequence_ids=sequence_T,
        adapter=adapter_T,
        adapter_names=("few", "many"),
        expert_bytes=np.array([[10, 20, 30, 40], [5, 6, 7, 0]]),
        null_experts=1,
    )


def test_every_adapter_and_expert_has_its_own_load() -> None:
    """Renumbering keeps every assignment: summed over adapters, loads are those of the base trace."""
    trace = tagged()
    separated, keys = separate_adapters(trace)
    assert separated.experts_per_layer.tolist() == [4 + 1 + 4, 3 + 3 + 3]
    assert keys.adapter_LE[0].tolist() == [-1, -1, -1, -1, 0, 1, 1, 1, 1]
    assert keys.base_LE[0].tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    load_LE = RoutingStats.from_trace(separated).load
    for adapter in (-1, 0, 1):
        assert trace.adapter is not None
        part = RoutingStats.from_trace(trace.select(trace.adapter == adapter)).load
        for layer in range(2):
            own = keys.adapter_LE[layer] == adapter
            found = np.zeros(4, np.int64)
            np.add.at(found, keys.base_LE[layer][own], load_LE[layer][own])
            assert (found * own.any() == part[layer]).all()
    assert separated.expert_bytes is not None
    assert separated.expert_bytes[0].tolist() == [10, 20, 30, 40, 30, 10, 20, 30, 40]
    nulls = [(t.topk_ids >= t.experts_per_layer[:, None]).sum() for t in (trace, separated)]
    assert nulls[0] == nulls[1] > 0


def test_owned_experts_decide_what_is_told_apart() -> None:
    """What an adapter does not own it shares with the base; nothing owned, nothing changed."""
    trace = tagged()
    owned_ALE = np.zeros((2, 2, 4), dtype=bool)
    same, _ = separate_adapters(trace, owned_ALE)
    assert np.array_equal(same.topk_ids, trace.topk_ids)
    owned_ALE[1, 0, 3] = True
    separated, keys = separate_adapters(trace, owned_ALE)
    assert separated.experts_per_layer.tolist() == [5, 3]
    assert (keys.base_LE[0, 4], keys.adapter_LE[0, 4]) == (3, 1)
    assert trace.adapter is not None
    moved = (trace.topk_ids[:, 0] == 3) & (trace.adapter == 1)[:, None]
    assert (separated.topk_ids[:, 0][moved] == 4).all()
    assert (separated.topk_ids[:, 0] == 4).sum() == moved.sum()
    with pytest.raises(InputError, match="cannot own expert 3 of MoE layer 1, which has 3"):
        separate_adapters(trace, np.ones((2, 2, 4), dtype=bool))
    with pytest.raises(InputError, match=r"shape \(2, 2, 4\)"):
        separate_adapters(trace, np.ones((1, 2, 4), dtype=bool))
    with pytest.raises(InputError, match="no array `adapter`"):
        used_by_adapters(trace.replace(adapter=None))


def test_solver_and_evaluation_take_what_is_told_apart() -> None:
    """Unequal layers with null experts are placed; all tokens of an expert count where its variant is."""
    separated, _ = separate_adapters(tagged())
    cluster = Cluster.uniform(3, slots_per_rank=even_slots(separated.num_experts, 3).tolist())
    problem = Problem.from_trace(separated.split("train"), cluster, objective="traffic")
    placement = solve(problem, time_limit=0.5).placement
    assert [
        len(set(row[row >= 0].tolist())) for row in placement.slot_to_expert
    ] == separated.experts_per_layer.tolist()
    ours, base = (
        evaluate(separated.split("train"), p)
        for p in (placement, index_order(separated.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank))
    )
    assert ours.ranks_per_token <= base.ranks_per_token
    assert ours.load_LR.sum() == RoutingStats.from_trace(separated.split("train")).load.sum()


def test_adapters_of_several_traces_are_joined_by_name() -> None:
    """Index 0 of one trace may be index 1 of the other; the base stays the base."""
    first, other = tagged(0, tokens=32), tagged(1, tokens=32).replace(adapter_names=("many", "few"))
    joined = concatenate([first, other])
    assert joined.adapter_names == ("few", "many")
    assert joined.adapter is not None
    assert first.adapter is not None
    assert (joined.adapter[32:] == np.array([1, 0, -1])[first.adapter]).all()
    train, test = joined.hold_out("few", by="adapter")
    assert train.num_tokens + test.num_tokens == 64
    with pytest.raises(InputError, match="adapter 'z' is not among"):
        joined.hold_out("z", by="adapter")
    with pytest.raises(InputError, match=r"adapter index 2 needs -1\.\.1"):
        first.replace(adapter=np.full(32, 2))


@pytest.mark.parametrize("text", ["few=1,many=1", "base=1,few=3", "many=5"])
def test_a_mix_has_the_shares_asked_for(text: str) -> None:
    """As many tokens as before, whole sequences but the last of a tag, sides of the split unchanged."""
    trace, shares = tagged(), parse_mix(text)
    mixed = mix(trace, shares, seed=1)
    assert mixed.num_tokens == trace.num_tokens
    assert mixed.adapter is not None
    numbers = {"base": -1, "few": 0, "many": 1}
    for name, number in numbers.items():
        assert (mixed.adapter == number).mean() == pytest.approx(shares.get(name, 0.0), abs=1 / trace.num_tokens)
    for side in ("train", "test"):
        known = {row.tobytes() for row in trace.split(side).topk_ids}
        try:
            rows = mixed.split(side).topk_ids
        except InputError:  # all sequences of a tag may lie on one side
            continue
        assert {row.tobytes() for row in rows} <= known
    assert mix(trace, shares, seed=1).equals(mixed)


def test_a_mix_by_workload() -> None:
    """Names of workloads work where they are not names of adapters."""
    trace = tagged().replace(adapter=None, adapter_names=(), workload=np.arange(240) // 120, workload_names=("a", "b"))
    mixed = mix(trace, {"a": 0.25, "b": 0.75}, seed=0)
    assert mixed.workload is not None
    assert mixed.workload.mean() == 0.75


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be names with shares"),
        ("a", "must be names with shares"),
        ("few=x", "must be names with shares"),
        ("few=-1", "must be names with shares"),
        ("few=0", "must have a share above 0"),
        ("other=1", "names 'other'"),
        ("third=1", "has no token"),
    ],
)
def test_a_mix_that_cannot_be_made_is_refused(text: str, words: str) -> None:
    """One sentence with the name and the rule."""
    trace = tagged().replace(adapter_names=("few", "many", "third"))
    with pytest.raises(InputError, match=words):
        mix(trace, parse_mix(text), seed=0)
