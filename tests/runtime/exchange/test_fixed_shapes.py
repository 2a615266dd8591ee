"""Exchanges in fixed shapes: results of the exact form, nothing read on the host, exact also where there is no room."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange import host_counts
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.dispatcher import MoeRuntime, Step, TokenRows
from moeplace.runtime.exchange.factory import make_dispatcher
from moeplace.runtime.exchange.fixed import counts
from moeplace.runtime.exchange.fixed.factory import make_fixed_shapes
from moeplace.runtime.exchange.fixed.rows import FixedRowExchange
from moeplace.runtime.exchange.fixed.step import FixedShapes
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights
from moeplace.runtime.measure.host_reads import HostReads
from tests.rank_pool import RankContext, RankPool
from tests.runtime.exchange.cases import CASES
from tests.runtime.placements import random_placement
from tests.runtime.thread_ranks import run_groups
from tests.runtime.toy_layers import ToyModel

FORMS = ("dispatch-combine", "node-aware", "coherent")


class Noted:
    """A window that keeps what it is told."""

    names_tokens = True

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, tuple[int, ...]]] = []

    def record(self, layer: int, ids: np.ndarray, token: np.ndarray | None = None) -> None:
        assert token is not None
        self.rows += [(layer, int(name), tuple(row)) for name, row in zip(token, ids.tolist(), strict=True)]


class NoRoom:
    """A rule of capacity without room in one layer until a pass has been observed."""

    def __init__(self, rule: Any, layer: int) -> None:
        self._rule, self._layer, self._seen = rule, layer, False

    def capacity(self, layer: int, step: Step) -> Capacity:
        found = self._rule.capacity(layer, step)
        if layer != self._layer or self._seen:
            return found
        return Capacity(*([min(rows, 1) for rows in side] for side in (found.to_peer, found.from_peer)))

    def observe(self, layer: int, step: Step, sent: Any, received: Any) -> None:
        self._seen |= layer == self._layer
        self._rule.observe(layer, step, sent, received)

    rows = property(lambda self: self._rule.rows)


def make_shapes(form: str, runtime: MoeRuntime, group: Any) -> FixedShapes:
    mode: Any = "dispatch-combine" if form == "node-aware" else form
    exact = make_dispatcher(mode, runtime, group, node_aware=form == "node-aware")
    shapes = make_fixed_shapes(exact, runtime, group)
    assert shapes is not None
    return shapes


def take_room(shapes: FixedShapes, form: str, layer: int, top_k: int) -> None:
    exact: Any = shapes.exact
    rules = exact.rules_for(top_k)
    tight: dict[str, Any] = {
        "coherent": lambda: replace(rules, dispatch=NoRoom(rules.dispatch, layer)),
        "dispatch-combine": lambda: replace(rules, all=NoRoom(rules.all, layer)),
        "node-aware": lambda: replace(rules, node=tuple(NoRoom(rule, layer) for rule in rules.node)),
    }
    exact._rules = tight[form]()


def run_fixed(
    context: RankContext,
    model: ToyModel,
    nodes: int,
    seed: int,
    homes: tuple[int, ...],
    short: bool,
    tight: int | None,
    forms: Any = FORMS,
) -> dict[str, Any]:
    """Per form: tokens, rows, tokens computed, extra runs, host reads inside the layers, routing noted, two steps."""
    placement = random_placement(
        model.num_layers, model.num_experts, context.size, seed=seed, extra_slots=seed % 3, nodes=nodes
    )
    counters = Counters()
    group = context.group(placement.node_of_rank, counters=counters, short_messages=None if short else False)
    results = {}
    for form in forms:
        window = Noted()
        runtime = replace(model.runtime(placement, context.rank, counters), window=window)
        shapes = make_shapes(form, runtime, group)
        if tight is not None:
            take_room(shapes, form, tight, model.ids.shape[2])
        counters.reset()
        step = Step(homes)
        found = []
        for _ in range(2):
            rows = shapes.run(lambda dispatcher, step=step: model.run(dispatcher, context.rank, step))
            found.append((rows.token.numpy().copy(), rows.x.numpy().copy(), counters.overflows))
        runtime.computation.flush_counts()
        results[form] = (found, counters.tokens.total(), sorted(window.rows))
    return results


def check_forms(results: list[dict[str, Any]], model: ToyModel, forms: Any = FORMS) -> None:
    """Twice every token with its value, its assignments computed and its routing noted once."""
    expected = model.reference().numpy()
    routed = sorted(
        (layer, token, tuple(model.ids[layer, token].tolist()))
        for layer in range(model.num_layers)
        for token in range(len(expected))
    )
    for form in forms:
        for step in range(2):
            tokens = np.concatenate([result[form][0][step][0] for result in results])
            np.testing.assert_array_equal(np.sort(tokens), np.arange(len(expected)), err_msg=form)
            values = np.concatenate([result[form][0][step][1] for result in results])
            np.testing.assert_allclose(values, expected[tokens], rtol=1e-12, atol=1e-12, err_msg=form)
        assert sum(result[form][1] for result in results) == 2 * int((model.ids >= 0).sum()), form
        noted = sorted(row for result in results for row in result[form][2])
        assert noted == sorted([*routed, *routed]), form


@pytest.mark.parametrize("name", [name for name in CASES if name != "more tokens than are padded"])
@pytest.mark.parametrize("short", [True, False], ids=["room for all", "expected"])
def test_every_form_equals_the_reference(pool: RankPool, name: str, short: bool) -> None:
    """All shapes of the exact form's own test, twice, the second time with rooms that the first one taught."""
    arguments, size, nodes, homes = CASES[name]
    model = ToyModel.random(**arguments)  # type: ignore[arg-type]
    results = pool.run(run_fixed, model, nodes, model.num_experts, homes, short, None, size=size)
    check_forms(results, model)
    if short:
        assert not any(result[form][0][1][2] for result in results for form in FORMS), "there was room for all"


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_step_without_room_is_run_again(pool: RankPool, layer: int, top_k: int, dated_seed: int) -> None:
    """Whichever layer has none: on all ranks alike, once, and what was noted of the first run is not kept."""
    model = ToyModel.random(60, layers=3, experts=8, top_k=top_k, seed=dated_seed % 1000)
    results = pool.run(run_fixed, model, 2, dated_seed % 97, (20, 0, 33, 7), True, layer)
    check_forms(results, model)
    for form in FORMS:
        overflows = [[step[2] for step in result[form][0]] for result in results]
        # The exact form lacks the room too, and has extra rounds of its own; those inside nodes are each node's.
        assert all(first == second >= 1 for first, second in overflows), (form, overflows)
        if form != "node-aware":
            assert overflows[0] == overflows[1] == overflows[2] == overflows[3], (form, overflows)


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_everything_to_one_rank(pool: RankPool, top_k: int) -> None:
    """Up to all experts per token; all tokens to the same ones, which no rule expects."""
    model = ToyModel.random(96, layers=2, experts=7, top_k=top_k, seed=top_k, single=True)
    results = pool.run(run_fixed, model, 2, 3, (90, 0, 6, 0), False, None)
    check_forms(results, model)
    assert all(result["coherent"][0][0][2] == result["coherent"][0][1][2] for result in results), "room was learnt"


def test_counts_on_both_sides_are_equal(dated_seed: int) -> None:
    """Ranks, owners and gateways of random tokens on the device are those on the host."""
    rng = np.random.default_rng(dated_seed)
    for _ in range(30):
        ranks, top_k, tokens = (int(n) for n in (rng.integers(1, 7), rng.integers(1, 6), rng.integers(0, 9)))
        rank_NK = rng.integers(-1, ranks, (tokens, top_k))
        count_NR = host_counts.count_by_rank(rank_NK, ranks)
        np.testing.assert_array_equal(counts.count_by_rank(torch.from_numpy(rank_NK), ranks), count_NR)
        brute = [[int((row == rank).sum()) for rank in range(ranks)] for row in rank_NK]
        np.testing.assert_array_equal(count_NR, np.array(brute).reshape(tokens, ranks))
        before_N = rng.integers(0, ranks, tokens)
        owner_N = host_counts.choose_owner(count_NR, before_N)
        on_device = counts.choose_owner(torch.from_numpy(count_NR), torch.from_numpy(before_N))
        np.testing.assert_array_equal(on_device, owner_N)
        node_R = np.sort(rng.integers(0, ranks, ranks))
        node_R = np.unique(node_R, return_inverse=True)[1]
        nodes = tuple(
            slice(int((node_R < node).sum()), int((node_R <= node).sum())) for node in range(int(node_R[-1]) + 1)
        )
        gateway_NR = host_counts.gateways_of(count_NR, node_R)
        np.testing.assert_array_equal(counts.gateways_of(torch.from_numpy(count_NR), nodes), gateway_NR)
        for token in range(tokens):
            for part in nodes:
                on_node = count_NR[token, part]
                wanted = np.arange(len(on_node)) == on_node.argmax() if on_node.any() else np.zeros(len(on_node), bool)
                np.testing.assert_array_equal(gateway_NR[token, part], wanted)


def test_rows_get_places_in_order(dated_seed: int) -> None:
    """Every message has its rows in their order, as many as fit, and says when there are more."""
    rng = np.random.default_rng(dated_seed)
    for _ in range(30):
        ranks, rows = int(rng.integers(1, 6)), int(rng.integers(0, 9))
        wanted_NR = rng.random((rows, ranks)) < rng.random()
        rooms = rng.integers(0, 6, ranks)
        starts = rooms.cumsum() - rooms
        packed = counts.pack_messages(
            torch.from_numpy(wanted_NR), torch.from_numpy(starts), torch.from_numpy(rooms), int(rooms.sum())
        )
        expected: list[int] = []
        for rank, room in enumerate(rooms):
            fit = np.flatnonzero(wanted_NR[:, rank])[:room].tolist()
            expected += fit + [rows] * (int(room) - len(fit))
        assert packed.source_P.tolist() == expected
        assert bool(packed.exceeded) == bool((wanted_NR.sum(0) > rooms).any())
        held, room = torch.from_numpy(rng.random(rows) < 0.5), int(rng.integers(0, 9))
        seated = counts.seat_rows(held, room)
        assert seated.row[: int(held.sum())].tolist() == held.nonzero().squeeze(1).tolist()[:room]
        assert bool(seated.exceeded) == (int(held.sum()) > room)


class SilentGroup:
    """A group whose collectives bring nothing: for tensors without values."""

    def __init__(self, rank: int, nodes: list[int], mates: list[int] | None = None) -> None:
        self.rank, self.size, self.node_of_rank = rank, len(nodes), np.array(nodes)
        self.num_nodes, self.counters, self.short_messages = nodes[-1] + 1, Counters(), False
        self.node_ranks = [r for r, node in enumerate(nodes) if node == nodes[rank]] if mates is None else mates
        self.device = torch.device("cpu")

    def node_group(self) -> "SilentGroup":
        inside = SilentGroup(self.node_ranks.index(self.rank), [0] * len(self.node_ranks))
        inside.device = self.device
        return inside

    @contextmanager
    def layer(self, layer: int, *, mode: str) -> Iterator[None]:
        yield

    def raise_if_lost(self) -> None:
        """Nobody is."""

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, into: Any, out_of: Any, *, kind: str) -> None:
        assert len(output) == sum(into)
        assert len(input) == sum(out_of)


class MetaBlock:
    """A router and shared experts of fixed shapes."""

    def __init__(self, top_k: int, device: str) -> None:
        self._gate = torch.zeros(16, 8, device=device, dtype=torch.bfloat16)
        self._top_k = top_k

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = (hidden @ self._gate).topk(self._top_k, dim=1)
        return ids, weights

    def shared(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def meta_runtime(placement: Any, rank: int, counters: Counters) -> MoeRuntime:
    """Experts of 16 x 8 in bfloat16 whose tensors have no values."""
    tables = SlotTables.from_placement(placement, rank=rank)
    weights = [
        ExpertWeights.empty(tables.slots_here, 16, 8, bias=False, dtype=torch.bfloat16, device="cpu") for _ in range(3)
    ]
    store: Any = ExpertStore(weights, slots=tables.slots_here)
    store.weights = [layer.like({name: part.to("meta") for name, part in layer.parts().items()}) for layer in weights]
    store._rows = [rows.to("meta") for rows in store._rows]
    on_meta = SlotTables.from_placement(placement, rank=rank, device="meta")
    return MoeRuntime(on_meta, store, ExpertComputation(store, counters=counters), counters, Noted())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("extra_slots", [0, 2], ids=["one slot each", "replicas"])
def test_nothing_is_read_on_the_host(form: str, top_k: int, extra_slots: int) -> None:
    """Layers run on tensors that have shapes but no values: who reads one fails. The next layer's shapes are known."""
    placement = random_placement(3, 8, 4, seed=1, extra_slots=extra_slots, nodes=2)
    rank, homes = 1, (5, 6, 0, 7)
    group: Any = SilentGroup(rank, [0, 0, 1, 1])
    on_host = ToyModel.random(18, layers=3, experts=8, top_k=top_k, seed=1).runtime(placement, rank, group.counters)
    shapes = make_shapes(form, on_host, group)
    exact: Any = shapes.exact
    exact.rules_for(top_k)  # made before steps, from the tables on the host
    exact.runtime = meta_runtime(placement, rank, group.counters)
    for each in (group, *([exact.node] if form == "node-aware" else [])):
        each.device = torch.device("meta")
    on_meta = make_fixed_shapes(exact, exact.runtime, group)
    assert on_meta is not None
    fixed = on_meta.fixed
    token = torch.empty(homes[rank], dtype=torch.int64, device="meta")
    rows = TokenRows(torch.empty(homes[rank], 16, dtype=torch.bfloat16, device="meta"), token)
    block = MetaBlock(top_k, "meta")
    with HostReads() as reads:
        for layer in range(3):
            rows = fixed.forward(layer, block, rows, Step(homes))
    flag = fixed.notes.flag(rows.x.device)
    assert flag.device.type == "meta"
    assert reads.total == 0, reads.calls
    assert len(rows) == (homes[rank] if form != "coherent" else exact._rules.held.rows(2, Step(homes)))


def count_reads(context: RankContext, model: ToyModel) -> list[int]:
    """Host reads of a step of every form."""
    placement = random_placement(model.num_layers, model.num_experts, context.size, seed=1, nodes=2)
    group = context.group(placement.node_of_rank)
    found = []
    for form in FORMS:
        shapes = make_shapes(form, model.runtime(placement, context.rank, Counters()), group)
        model.run(shapes.fixed, context.rank, Step((4,) * 4))
        with HostReads() as reads:
            model.run(shapes.fixed, context.rank, Step((4,) * 4))
        found.append(reads.total - reads.calls["numpy"])  # the loop over groups of float64, on a CPU
    return found


def test_layers_read_nothing_when_they_run(pool: RankPool) -> None:
    """The same with values, on the CPU: no number is asked for, and no size follows from one."""
    model = ToyModel.random(16, layers=3, experts=8, top_k=2, seed=2)
    assert pool.run(count_reads, model) == [[0, 0, 0]] * 4


class TellingGroup(SilentGroup):
    """Says that another rank had no room, or that all had."""

    exceeded = 0

    def all_reduce(self, tensor: torch.Tensor, *, kind: str) -> None:
        tensor += self.exceeded


@pytest.mark.parametrize("exceeded", [0, 1])
def test_the_running_load_is_that_of_one_run(exceeded: int) -> None:
    """Where replicas are chosen by the load so far, a step that runs again begins with the load before it."""
    placement = random_placement(2, 6, 2, seed=4, extra_slots=2)
    group: Any = TellingGroup(0, [0, 0])
    group.exceeded = exceeded
    model = ToyModel.random(9, layers=2, experts=6, top_k=2, seed=3)
    bare = model.runtime(placement, 0, group.counters)
    runtime = replace(bare, running=RunningLoad.none(bare.tables))
    shapes = make_shapes("dispatch-combine", runtime, group)
    loads: list[torch.Tensor] = []

    def run_layers(dispatcher: Any) -> TokenRows:
        assert runtime.running is not None
        loads.append(runtime.running.carried_LR.clone())
        runtime.running.carried_LR.add_(7)
        return TokenRows(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))

    shapes.run(run_layers)
    assert runtime.running is not None
    assert len(loads) == 1 + exceeded
    assert not torch.stack(loads).any()
    assert (runtime.running.carried_LR == 7).all()


@pytest.mark.parametrize("top_k", [1, 3])
def test_as_many_copies_are_sent_as_without_fixed_shapes(top_k: int, dated_seed: int, monkeypatch: Any) -> None:
    """Places that nobody needs stay empty: a copy goes where an expert of its token is, and nowhere else."""
    homes, nodes = (3, 5, 0, 4), [0, 0, 1, 1]
    model = ToyModel.random(sum(homes), layers=2, experts=8, top_k=top_k, seed=dated_seed % 1000)
    placement = random_placement(2, 8, 4, seed=dated_seed % 1000, nodes=2)
    sent: Counter[tuple[int, str]] = Counter()
    send = FixedRowExchange.send

    def count(self: Any, layout: Any, token: Any, values: Any, wanted_NR: torch.Tensor, rooms: Any) -> Any:
        sent[threading.get_ident(), form_of[threading.get_ident()]] += int(wanted_NR.sum())
        return send(self, layout, token, values, wanted_NR, rooms)

    monkeypatch.setattr(FixedRowExchange, "send", count)
    form_of: dict[int, str] = {}

    def act(group: RankGroup) -> None:
        runtime, me = model.runtime(placement, group.rank, group.counters), threading.get_ident()
        for form in FORMS:
            form_of[me] = form
            shapes = make_shapes(form, runtime, group)
            group.counters.reset()
            model.run(shapes.exact, group.rank, Step(homes))
            exact = group.counters.copies_sent
            shapes.run(lambda dispatcher: model.run(dispatcher, group.rank, Step(homes)))
            assert group.counters.overflows == 0
            assert sent[me, form] == exact > 0 or not homes[group.rank]

    run_groups(act, nodes)
