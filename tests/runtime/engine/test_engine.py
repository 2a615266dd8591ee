"""The invariant: for any valid placement, mode and number of ranks, the logits are those of the plain model."""

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.modes import ModeChoice, RecordedRouting, TracePredictor, choose_mode_rule
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import (
    DEEPSEEK_TOLERANCE,
    FAMILIES,
    TOLERANCE,
    VOCABULARY,
    Oracle,
    ask_plain_model,
    make_oracle,
    save_checkpoint,
)
from tests.runtime.placements import placement_for, random_placement
from tests.shared_data import tiny_moe_path, tiny_moe_top2_path

VARIANTS = [(mode, False) for mode in MODES] + [("dispatch-combine", True)]


def serve(
    context: RankContext,
    path: Path,
    sequences: Any,
    prompt_lengths: Any,
    requests: list[Request],
    seed: int,
    variants: Any = VARIANTS,
) -> list[tuple[list[np.ndarray], list[tuple[int, ...]], dict[str, Any]]]:
    """Logits, completions and counters of every mode on this rank, under a random placement with replicas."""
    checkpoint = Checkpoint(path)
    results = []
    group = context.group()
    placement = placement_for(checkpoint, context.size, seed=seed, extra_slots=seed % 3, nodes=min(2, context.size))
    group = group.with_nodes(placement.node_of_rank)
    limits = EngineLimits(max_sequences=4 * context.size, max_length=20, max_prefill_tokens=12)
    for mode, node_aware in variants:
        engine = Engine(
            checkpoint, placement, mode=mode, group=group, dtype=torch.float64, limits=limits, node_aware=node_aware
        )
        logits = [block.numpy() for block in engine.score(sequences, prompt_lengths=prompt_lengths)]
        completions = engine.generate(requests if context.rank == 0 else None)
        results.append((logits, [c.token_ids for c in completions], engine.counters()))
        engine.group.counters.reset()
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits_and_tokens_are_those_of_the_plain_model(pool: RankPool, oracle: Oracle, size: int) -> None:
    """Every family, mode and number of ranks: teacher-forced logits across the prefill/decode border, and tokens."""
    arguments = (oracle.path, oracle.sequences, oracle.prompt_lengths, oracle.requests, size)
    for rank, results in enumerate(pool.run(serve, *arguments, size=size)):
        tolerance = DEEPSEEK_TOLERANCE if "deepseek" in oracle.path.name else TOLERANCE
        for (mode, node_aware), (logits, completions, _) in zip(VARIANTS, results, strict=True):
            label = f"rank {rank}, {mode}{', node-aware' if node_aware else ''}"
            for ours, plain in zip(logits, oracle.logits, strict=True):
                np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance, err_msg=label)
            assert completions == oracle.completions, label


def count_decoding(context: RankContext, path: Path, mode: str, nodes: int = 1) -> tuple[dict[str, Any], int]:
    """Counters of a run that only decodes, and the load that all ranks saw."""
    placement = random_placement(3, 6, context.size, seed=3, nodes=nodes)
    group = context.group().with_nodes(placement.node_of_rank)
    engine = Engine(path, placement, mode=mode, group=group)
    for number in range(6):
        engine.add_request(Request(str(number), (number, 5), max_new_tokens=6, stop_ids=()))
    engine.step()  # the prefill, of all
    engine.window.reset()
    group.counters.reset()
    while not engine.scheduler.is_idle:
        engine.step()
    return engine.counters(), int(engine.window.load.sum())


@pytest.mark.parametrize(("mode", "expected"), [("coherent", 1), ("dispatch-combine", 2), ("allgather", 2)])
def test_collectives_of_a_decode_step(pool: RankPool, tmp_path: Path, mode: str, expected: int) -> None:
    """Top-1: exactly one collective per MoE layer when coherent; K/V in pieces, after one hand-over."""
    save_checkpoint("olmoe", tmp_path)
    results = pool.run(count_decoding, tmp_path, mode)
    # steps, sequences, layers: every token is counted by one rank
    assert sum(load for _, load in results) == 5 * 6 * 3
    for counters, _ in results:
        assert counters["collectives_per_layer_by_mode"] == {mode: expected}
        assert counters["steps"] == 5
        kv = 1 + 5 * 2  # a hand-over, and 2 pieces a step for 3 layers
        outside = {"tokens": 5} | ({"kv": kv} if mode == "coherent" else {})
        assert counters["collectives_outside_layers"] == outside
        assert counters["single_exchange_share"] == (mode == "coherent")


@pytest.mark.parametrize("nodes", [1, 2])
def test_kv_travel_in_more_pieces_between_nodes(pool: RankPool, tmp_path: Path, nodes: int) -> None:
    """One for two layers within a node; between nodes one for each, which is passed on inside them."""
    save_checkpoint("olmoe", tmp_path)
    pieces, hops = (2, 1) if nodes == 1 else (3, 2)
    for counters, _ in pool.run(count_decoding, tmp_path, "coherent", nodes, size=4):
        assert counters["collectives_outside_layers"]["kv"] == (1 + 5 * pieces) * hops, counters


class AlternatingModes:
    """Another mode in every pass."""

    may_be_coherent = True

    def __init__(self) -> None:
        self._next = itertools.cycle(("coherent", "dispatch-combine", "allgather"))

    def choose(self, phase: str, num_tokens: int) -> ModeChoice:
        mode = next(self._next)
        return ModeChoice("allgather" if phase == "prefill" else mode, "another one each time")


def serve_alternating(context: RankContext, path: Path, requests: list[Request]) -> list[tuple[int, ...]]:
    group = context.group()
    engine = Engine(
        path, random_placement(3, 5, context.size, seed=4), group=group, dtype=torch.float64, mode=AlternatingModes()
    )
    return [completion.token_ids for completion in engine.generate(requests)]


def test_modes_may_change_in_every_pass(pool: RankPool, tmp_path: Path) -> None:
    """K/V that exist at home only are handed over before a coherent pass, whenever it comes."""
    oracle = make_oracle("mixtral", tmp_path)
    for completions in pool.run(serve_alternating, tmp_path, oracle.requests, size=3):
        assert completions == oracle.completions


def serve_in_turn(context: RankContext, path: Path, requests: list[Request]) -> list[dict[str, tuple[int, ...]]]:
    """Tokens of two coherent engines on one group that step in turn, with counters set back whenever it pleases."""
    checkpoint, group = Checkpoint(path), context.group()
    limits = EngineLimits(max_sequences=len(requests), max_length=20, max_prefill_tokens=12)
    engines = [
        Engine(checkpoint, None, mode=mode, group=group, dtype=torch.float64, limits=limits)
        for mode in ("coherent", "coherent", "dispatch-combine")
    ]
    done: list[dict[str, tuple[int, ...]]] = [{} for _ in engines]
    for engine in engines:
        for request in requests:
            engine.add_request(request)
    while not all(engine.scheduler.is_idle for engine in engines):
        for engine, found in zip(engines, done, strict=True):
            found.update({completion.request_id: completion.token_ids for completion in engine.step()})
        group.counters.reset()
    return done


@pytest.mark.parametrize("size", [2, 3])
def test_engines_of_one_group_do_not_meet(pool: RankPool, tmp_path: Path, size: int) -> None:
    """What is on its way belongs to its engine and step, whatever else the group does, whatever is counted."""
    oracle = make_oracle("olmoe", tmp_path)
    expected = {request.request_id: tokens for request, tokens in zip(oracle.requests, oracle.completions, strict=True)}
    assert len(set(expected.values())) > 1
    for done in pool.run(serve_in_turn, oracle.path, oracle.requests, size=size):
        assert done == [expected] * 3


def test_auto_follows_predictions_or_the_placement(tmp_path: Path) -> None:
    """With recorded routing the least predicted time wins and the reason lists all; without, the placement's mode."""
    save_checkpoint("olmoe", tmp_path)
    placement = random_placement(3, 6, 4, seed=0, extra_slots=0, mode="coherent")
    rule = choose_mode_rule("auto", placement)
    assert rule.choose("decode", 8).mode == "coherent"
    assert rule.choose("prefill", 8).mode == "dispatch-combine"
    ids = np.random.default_rng(0).integers(0, 6, (64, 3, 1))
    trace = RoutingTrace(topk_ids=ids, experts_per_layer=np.full(3, 6))
    predictor = TracePredictor(RecordedRouting(trace), placement, StepShape(hidden_size=16, dtype_bytes=4, kv_dim=32))
    choice = choose_mode_rule("auto", placement, predictor).choose("decode", 5)
    seconds = {mode: predictor(mode, "decode", 5) for mode in MODES}
    assert choice.mode == min(seconds, key=seconds.__getitem__)
    assert all(mode in choice.reason for mode in MODES)
    assert "coherent" not in choose_mode_rule("auto", placement, predictor).choose("prefill", 5).reason


def everywhere(checkpoint: Checkpoint, num_ranks: int) -> Placement:
    """All experts on all ranks."""
    experts = int(checkpoint.experts_per_layer[0])
    slots = np.tile(np.arange(experts), (checkpoint.num_layers, num_ranks))
    return Placement(
        slots,
        np.full(num_ranks, experts),
        np.zeros(num_ranks, int),
        checkpoint.experts_per_layer,
        layer_ids=checkpoint.layer_ids,
        num_hidden_layers=checkpoint.num_hidden_layers,
    )


def serve_and_let_one_join(context: RankContext, path: Path, requests: list[Request]) -> list[tuple[int, ...]]:
    """Tokens after a rank has come to two that have served, by predicted modes."""
    checkpoint, newcomer = Checkpoint(path), context.size - 1
    recorded = RecordedRouting(RoutingTrace(np.random.default_rng(0).integers(0, 6, (64, 3, 1)), np.full(3, 6)))

    def make(group: RankGroup) -> Engine:
        placement = everywhere(checkpoint, group.size)
        return Engine(checkpoint, placement, group=group, dtype=torch.float64, recorded=recorded)

    if context.rank == newcomer:
        engine = make(context.group())
    else:
        store = PrefixStore("before", context.store)
        engine = make(RankGroup(store, rank=context.rank, size=newcomer, timeout=context.timeout))
        engine.generate(requests)
        group, placement = context.group(), everywhere(checkpoint, context.size)
        engine.agree(group, placement)
        engine.regroup(group, placement, version=1)
    return [completion.token_ids for completion in engine.generate(requests)]


def test_who_joins_decides_about_modes_with_the_others(pool: RankPool, tmp_path: Path) -> None:
    """Ranks that knew the mode of a batch ask again, together with the one that does not."""
    oracle = make_oracle("olmoe", tmp_path)
    for completions in pool.run(serve_and_let_one_join, tmp_path, oracle.requests, size=3):
        assert completions == oracle.completions


@pytest.mark.parametrize("find", [tiny_moe_path, tiny_moe_top2_path])
def test_trained_checkpoints(pool: RankPool, find: Callable[[], Path]) -> None:
    """The trained models on four ranks, in float64: same logits, same tokens."""
    oracle = ask_plain_model(find(), new_tokens=3)
    arguments = (oracle.path, oracle.sequences, oracle.prompt_lengths, oracle.requests, 1, [("coherent", False)])
    for results in pool.run(serve, *arguments):
        for logits, completions, _ in results:
            for ours, plain in zip(logits, oracle.logits, strict=True):
                np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)  # gate weights are float32
            assert completions == oracle.completions


@pytest.mark.parametrize("wrong", [(VOCABULARY,), tuple(range(9)), ()])
def test_what_cannot_be_scored_leaves_nothing(tmp_path: Path, wrong: tuple[int, ...]) -> None:
    """Sequences before it have no place yet when it is refused: nobody serves them as if they were requests."""
    save_checkpoint("olmoe", tmp_path)
    engine = Engine(tmp_path, limits=EngineLimits(max_sequences=4, max_length=8))
    with pytest.raises(InputError):
        engine.score([(1, 2), wrong])
    assert engine.scheduler.is_idle
    assert [c.request_id for c in engine.generate([Request("a", (1, 2), 3)])] == ["a"]
    assert [len(logits) for logits in engine.score([(1, 2)] * 5)] == [2] * 5


def test_a_new_group_counts_all_of_what_follows(tmp_path: Path) -> None:
    """Also what its experts compute; the group before keeps what it has counted."""
    save_checkpoint("olmoe", tmp_path)
    groups = [RankGroup(HashStore(), rank=0, size=1, timeout=5) for _ in range(2)]
    engine = Engine(tmp_path, group=groups[0], limits=EngineLimits(max_sequences=4, max_length=8))
    request, counted = Request("a", (1, 2), 3, stop_ids=()), []
    for number, group in enumerate(groups):
        if number:
            engine.regroup(group, engine.placement, version=1)
        engine.generate([request])
        counted.append({name: value for name, value in engine.counters().items() if name != "seconds"})
    assert counted[0]["tokens_computed"] > 0
    assert counted[1] == {**counted[0], "placement_version": 1}
    assert groups[0].counters.tokens.total() == counted[0]["tokens_computed"]


@pytest.mark.parametrize("mode", ["coherent", "dispatch-combine", "allgather"])
def test_an_engine_lets_go_of_the_group_before(mode: str, tmp_path: Path) -> None:
    """Of all of it, connections too, and not only when the collector comes: ranks may change for months."""
    save_checkpoint("olmoe", tmp_path)
    before, after = (RankGroup(HashStore(), rank=0, size=1, timeout=5) for _ in range(2))
    engine = Engine(tmp_path, group=before, mode=mode, limits=EngineLimits(max_sequences=4, max_length=8))
    engine.generate([Request("a", (1, 2), 3, stop_ids=())])
    gc.collect()
    gc.disable()
    try:
        engine.regroup(after, engine.placement, version=1)
        kept = weakref.ref(before)
        before.close()
        del before
        assert len(engine.generate([Request("b", (1, 2), 3, stop_ids=())])) == 1
        assert kept() is None
    finally:
        gc.enable()


def test_arrivals_do_not_stop_what_runs() -> None:
    """A request comes before every pass: the first one gets a token at least every other pass."""
    engine = Engine(tiny_moe_path(), limits=EngineLimits(max_sequences=32))
    engine.add_request(Request("first", (1, 2, 3), 10, stop_ids=()))
    passes, done = 0, False
    while not done:
        engine.add_request(Request(f"later {passes}", (4, 5), 30, stop_ids=()))
        done = "first" in [completion.request_id for completion in engine.step()]
        passes += 1
    assert passes <= 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_gpu_equals_the_plain_model(tmp_path: Path, family: str) -> None:
    """The fixed-shape computation and the cache on CUDA, in float32."""
    oracle = make_oracle(family, tmp_path)
    group = RankGroup.from_environment(timeout=60, device="cuda:0")
    engine = Engine(tmp_path, group=group, dtype=torch.float32)
    logits = engine.score(oracle.sequences, prompt_lengths=oracle.prompt_lengths)
    for ours, plain in zip(logits, oracle.logits, strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), plain, rtol=0, atol=5e-3)
