"""The exchange modes against a reference of twenty lines, in float64, without any model."""

from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatcher import MoeRuntime, Step, TokenDispatcher
from moeplace.runtime.exchange.factory import make_dispatcher
from moeplace.runtime.exchange.host_counts import choose_owner
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.exchange.local import LocalDispatcher
from moeplace.runtime.kv.exchange import relay_links, share_kv
from tests.rank_pool import RankContext, RankPool
from tests.runtime.exchange.cases import CASES
from tests.runtime.placements import random_placement
from tests.runtime.toy_layers import ToyModel

MODES = ("dispatch-combine", "node-aware", "coherent", "allgather")


class OneRow:
    """Room for a single row in every message: nearly all of them overflow."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def capacity(self, layer: int, step: Step) -> Capacity:
        return Capacity([1] * self.ranks, [1] * self.ranks)

    def observe(self, layer: int, step: Step, sent: Any, received: Any) -> None:
        pass


def make_form(form: str, runtime: MoeRuntime, group: RankGroup) -> TokenDispatcher:
    if form == "coherent, no room":
        return CoherentDispatcher(runtime, group, capacity=OneRow(group.size))
    mode: Any = "dispatch-combine" if form == "node-aware" else form
    return make_dispatcher(mode, runtime, group, node_aware=form == "node-aware")


def run_modes(
    context: RankContext, model: ToyModel, nodes: int, seed: int, homes: tuple[int, ...], short: bool, modes: Any
) -> dict[str, tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Tokens, rows and counters of this rank at the end, per mode."""
    placement = random_placement(
        model.num_layers, model.num_experts, context.size, seed=seed, extra_slots=seed % 3, nodes=nodes
    )
    counters = Counters()
    group = context.group(placement.node_of_rank, counters=counters, short_messages=None if short else False)
    results = {}
    for mode in modes:
        runtime = model.runtime(placement, context.rank, counters)
        counters.reset()
        rows = model.run(make_form(mode, runtime, group), context.rank, Step(homes))
        results[mode] = (rows.token.numpy(), rows.x.numpy(), counters.snapshot())
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("short", [True, False], ids=["short", "padded"])
def test_every_mode_equals_the_reference(pool: RankPool, name: str, short: bool) -> None:
    """Every token is on exactly one rank at the end, with the value of the reference, whatever the mode."""
    arguments, size, nodes, homes = CASES[name]
    model = ToyModel.random(**arguments)  # type: ignore[arg-type]
    modes = (*MODES, "coherent, no room")
    results = pool.run(run_modes, model, nodes, model.num_experts, homes, short, modes, size=size)
    expected = model.reference().numpy()
    for mode in modes:
        tokens = np.concatenate([result[mode][0] for result in results])
        np.testing.assert_array_equal(np.sort(tokens), np.arange(len(expected)), err_msg=mode)
        values = np.concatenate([result[mode][1] for result in results])
        np.testing.assert_allclose(values, expected[tokens], rtol=1e-12, atol=1e-12, err_msg=mode)
        computed = sum(result[mode][2]["tokens_computed"] for result in results)
        assert computed == (model.ids >= 0).sum(), mode


def test_collectives_per_layer(pool: RankPool) -> None:
    """Top-1: coherent needs exactly one collective per layer, the others two, node-aware six, overflow one more."""
    model = ToyModel.random(24, layers=3, experts=8, top_k=1, seed=1)
    modes = (*MODES, "coherent, no room")
    results = pool.run(run_modes, model, 2, 3, (6, 6, 6, 6), True, modes)
    expected = {"dispatch-combine": 2, "node-aware": 6, "coherent": 1, "allgather": 2, "coherent, no room": 2}
    for result in results:
        assert {mode: result[mode][2]["collectives_per_layer"] for mode in modes} == expected
        assert result["coherent"][2]["single_exchange_share"] == 1
        assert result["coherent, no room"][2]["overflows"] == 3


def test_node_aware_sends_less_between_nodes(pool: RankPool) -> None:
    """One copy per node instead of one per rank: fewer bytes between nodes, for the same result."""
    model = ToyModel.random(64, layers=2, experts=8, top_k=4, seed=3)
    results = pool.run(run_modes, model, 2, 3, (16, 16, 16, 16), True, MODES[:2])
    plain, aware = (sum(r[mode][2]["bytes_sent"]["inter_node"] for r in results) for mode in MODES[:2])
    assert aware < 0.75 * plain


def share_everything(context: RankContext, nodes: int, announced: bool) -> tuple[np.ndarray, int]:
    """Every rank has `rank` K/V rows at layer 0 and one at layer 1; value = 100 * layer + token."""
    node = np.arange(context.size) * nodes // context.size
    group = context.group(node)
    ledger = KvLedger()
    for layer, count in enumerate((context.rank, 1)):
        token = torch.arange(count) + 10 * context.rank
        ledger.add(layer, token, (100.0 * layer + token)[:, None].repeat(1, 3))
    if announced:
        ledger.announce([rank + 1 for rank in range(context.size)])
    shared = share_kv(group, ledger)
    assert (shared.kv == (100.0 * shared.layer + shared.token)[:, None]).all()
    return (100 * shared.layer + shared.token).numpy(), sum(group.counters.collectives.values())


@pytest.mark.parametrize(("size", "nodes"), [(1, 1), (3, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("announced", [True, False])
def test_shared_kv_reaches_every_other_rank_once(pool: RankPool, size: int, nodes: int, announced: bool) -> None:
    """Each rank gets each row of the others exactly once; sizes cost a collective only if nobody announced them."""
    every = [{10 * r + i for i in range(r)} | {100 + 10 * r} for r in range(size)]
    for rank, (got, collectives) in enumerate(pool.run(share_everything, nodes, announced, size=size)):
        wanted = sorted(set().union(*every) - every[rank])
        assert sorted(got.tolist()) == wanted
        assert collectives == min(nodes, 2) + (not announced)


def test_relay_links_give_every_node_one_copy() -> None:
    """Each rank sends to exactly one rank of every other node."""
    node = np.array([0, 0, 0, 1, 2, 2])
    links = relay_links(node)
    for rank in range(len(node)):
        assert np.bincount(node[links[rank]], minlength=3).tolist() == [int(n != node[rank]) for n in range(3)]


def test_owner_rule() -> None:
    """Most experts; then the owner before; then the lowest rank; a token without experts stays."""
    count = np.array([[1, 2, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
    before = np.array([0, 2, 1, 0, 2])
    assert choose_owner(count, before).tolist() == [1, 2, 1, 1, 2]


def test_local_dispatcher_equals_the_reference() -> None:
    """The oracle of the other modes is itself right."""
    model = ToyModel.random(11, layers=3, experts=6, top_k=2, seed=4, absent=0.2)
    runtime = model.runtime(random_placement(3, 6, 1, seed=0), 0, Counters())
    rows = model.run(LocalDispatcher(runtime), 0, Step((11,)))
    torch.testing.assert_close(rows.x, model.reference(), rtol=1e-12, atol=1e-12)
