"""Engines are made on all ranks or on none; what one rank decides or fails at reaches the others."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine import engine as engine_module
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.modes import (
    AtHome,
    ModeChoice,
    ModeChooser,
    ModeRule,
    PredictedMode,
    RecordedRouting,
    TracePredictor,
)
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.errors import DisagreementError, PeerLostError
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.placements import random_placement


def make_several(context: RankContext, path: Path) -> list[list[tuple[int, ...]]]:
    """Completions of engines with several nodes, one after the other on one base group and then in turn."""
    group = context.group()
    engines = [
        Engine(
            path,
            random_placement(3, 5, context.size, seed=1, nodes=2),
            mode=mode,
            group=group,
            dtype=torch.float64,
            node_aware=True,
            replica_rule=rule,
        )
        for mode, rule in (
            ("dispatch-combine", "moeplace"), ("coherent", "balanced"), ("dispatch-combine", "balanced"),
        )
    ]  # fmt: skip
    requests = [Request(str(n), (n + 1, 2, 3), 4, stop_ids=()) for n in range(5)]
    return [[completion.token_ids for completion in engine.generate(requests)] for engine in (*engines, *engines)]


def test_engines_share_a_base_group(pool: RankPool, tmp_path: Path) -> None:
    """Several nodes: a second and a third engine are made on the same group, and all of them serve."""
    save_checkpoint("mixtral", tmp_path)
    for completions in pool.run(make_several, tmp_path):
        assert completions == [completions[0]] * 6


class Broken(Exception):
    """No error of ours."""


def fail_somewhere(context: RankContext, path: Path, where: str) -> tuple[str, str]:
    """Error type of each rank and what it and its causes say, when the last rank's construction fails at some point."""
    group = context.group()
    placement = random_placement(3, 6, context.size, seed=1)
    before = {name: getattr(engine_module, name) for name in ("prepare_engine", "load_experts")}

    def break_down(*_: Any, **__: Any) -> None:
        raise Broken("out of luck")

    if context.rank == context.size - 1:
        setattr(engine_module, where, break_down)
    try:
        engine = Engine(path, placement, group=group, limits=EngineLimits(max_length=16))
        engine.generate([Request("a", (1, 2))])
        return "no error", ""
    except Exception as error:
        causes = [error, error.__cause__, error.__context__]
        return type(error).__name__, " ".join(str(cause) for cause in causes if cause is not None)
    finally:
        group.close()  # as the end of a process would
        for name, function in before.items():
            setattr(engine_module, name, function)


def test_rules_of_engines_cannot_be_served_by(tmp_path: Path) -> None:
    """A name of another engine's replica rule is refused, and the sentence lists what can be asked for."""
    save_checkpoint("mixtral", tmp_path)
    with pytest.raises(InputError, match="replica rule 'hash' must be one of moeplace, balanced to serve by"):
        Engine(tmp_path, replica_rule="hash")


@pytest.mark.parametrize("where", ["prepare_engine", "load_experts"])
def test_an_error_of_any_kind_reaches_the_others(pool: RankPool, tmp_path: Path, where: str) -> None:
    """Before ranks agree and after: nobody waits until the timeout for a rank that will not come."""
    save_checkpoint("olmoe", tmp_path)
    results = pool.run(fail_somewhere, tmp_path, where, size=3)
    expected = DisagreementError if where == "prepare_engine" else PeerLostError
    assert [kind for kind, _ in results] == [expected.__name__] * 2 + ["Broken"]
    assert not [told for _, told in results if re.search("timed out|wait timeout", told, re.IGNORECASE)]


def choose_with_noise(context: RankContext, seed: int) -> list[Mode]:
    """Modes that a rank takes when predictions differ from rank to rank, and how often it was asked for them."""
    group, calls = context.group(), 0
    rng = np.random.default_rng([seed, context.rank])

    def predict(mode: Mode, phase: str, num_tokens: int) -> float:
        nonlocal calls
        calls += 1
        return float(rng.random())

    chooser = ModeChooser(PredictedMode(predict), random_placement(3, 6, context.size, seed=2), group)
    passes = np.random.default_rng(seed).integers(1, 3000, 60).tolist()
    modes = [chooser.choose("decode" if n % 2 else "prefill", n) for n in passes]
    assert bool(calls) == (context.rank == 0)
    assert group.counters.collectives[-1, "mode"] <= 2 * 13  # one per phase and power of two
    return modes


def test_rank_0_decides_what_floats_would_leave_open(pool: RankPool, dated_seed: int) -> None:
    """Predictions that no two ranks share: all ranks take the same modes, of which there are several."""
    chosen = pool.run(choose_with_noise, dated_seed, size=3)
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(set(chosen[0])) > 1
    assert set(chosen[0]) <= set(MODES)


def serve_predicted(context: RankContext, path: Path) -> list[tuple[int, ...]]:
    ids = np.random.default_rng(0).integers(0, 6, (200, 3, 1))
    recorded = RecordedRouting(RoutingTrace(topk_ids=ids, experts_per_layer=np.full(3, 6)))
    placement = random_placement(3, 6, context.size, seed=2)
    engine = Engine(path, placement, group=context.group(), dtype=torch.float64, recorded=recorded)
    return [c.token_ids for c in engine.generate([Request(str(n), (n, 3), 5, stop_ids=()) for n in range(7)])]


def test_recorded_routing_chooses_modes_on_several_ranks(pool: RankPool, tmp_path: Path) -> None:
    """`auto` with a trace gives the tokens of one rank."""
    save_checkpoint("olmoe", tmp_path)
    alone = pool.run(serve_predicted, tmp_path, size=1)[0]
    assert pool.run(serve_predicted, tmp_path, size=3) == [alone] * 3


def test_a_rule_of_ones_own_is_asked_on_every_rank() -> None:
    """No collective for it: the chooser of a fixed rule needs no group at all."""

    class Always:
        may_be_coherent = False

        def choose(self, phase: str, num_tokens: int) -> ModeChoice:
            return ModeChoice("allgather", "always")

    class NoGroup:
        rank, size = 1, 2

    chooser = ModeChooser(Always(), random_placement(3, 6, 2, seed=2), NoGroup())  # type: ignore[arg-type]
    assert chooser.choose("decode", 5) == "allgather"


class FirstOfTwo:
    """Rank 0 of a group whose other rank agrees to everything; counts what it is asked."""

    rank, size, device = 0, 2, torch.device("cpu")

    def __init__(self) -> None:
        self.asked = 0

    def broadcast(self, number: torch.Tensor, *, root: int, kind: str) -> None:
        self.asked += 1

    def raise_if_lost(self) -> None:
        """Nobody is."""


@pytest.mark.parametrize("wrap", [lambda rule: rule, AtHome], ids=["as it is", "at home"])
def test_predictions_follow_the_placement(wrap: Callable[[ModeRule], ModeRule]) -> None:
    """After a re-placement modes are those of an engine made for the new placement; the same again asks nobody."""
    ids = np.repeat(np.random.default_rng(0).integers(0, 6, (400, 1, 1)), 3, axis=1)  # an expert, in all layers
    recorded = RecordedRouting(RoutingTrace(ids, np.full(3, 6)))
    shape = StepShape(hidden_size=4096, dtype_bytes=2, kv_dim=4096)
    together, apart = (
        Placement(np.array(slots), np.array([3, 3]), np.zeros(2, int), np.full(3, 6))
        for slots in ([[0, 1, 2, 3, 4, 5]] * 3, [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    )

    def rule(placement: Placement) -> ModeRule:
        return wrap(PredictedMode(TracePredictor(recorded, placement, shape)))

    chooser, seen = ModeChooser(rule(apart), apart, FirstOfTwo()), []  # type: ignore[arg-type]
    for placement in (apart, together, apart):
        group = FirstOfTwo()
        chooser.follow(placement, group)  # type: ignore[arg-type]
        fresh = ModeChooser(rule(placement), placement, FirstOfTwo())  # type: ignore[arg-type]
        modes = [fresh.choose("decode", tokens) for tokens in (1, 64, 4096)]
        for _ in range(2):
            chooser.follow(replace(placement), group)  # type: ignore[arg-type]
            assert [chooser.choose("decode", tokens) for tokens in (1, 64, 4096)] == modes
        assert group.asked == 3
        seen.append(modes)
    assert (seen[0] != seen[1]) == (wrap is not AtHome), seen
