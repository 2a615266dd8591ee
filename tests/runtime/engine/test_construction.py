"""Engines are made on all ranks or on none; what one rank decides or fails at reaches the others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.modes import MODES, Mode
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine import engine as engine_module
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.modes import ModeChoice, ModeChooser, PredictedMode, RecordedRouting
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

    chooser = ModeChooser(PredictedMode(predict))
    passes = np.random.default_rng(seed).integers(1, 3000, 60).tolist()
    modes = [chooser.choose("decode" if n % 2 else "prefill", n, group) for n in passes]
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

    assert ModeChooser(Always()).choose("decode", 5, NoGroup()) == "allgather"  # type: ignore[arg-type]
