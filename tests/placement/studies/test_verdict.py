"""What `stats` says of a cluster: gains with intervals, tokens needed, what survives a change of routing."""

from dataclasses import replace

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES
from moeplace.placement.placement import Placement
from moeplace.placement.solve import solve
from moeplace.placement.studies.carry_over import carry_over
from moeplace.placement.studies.held_out import Gain, HeldOut, gain, ratio
from moeplace.placement.studies.learning_curve import CurvePoint, enough_tokens, learning_curve
from moeplace.placement.studies.verdict import Terms, _Ground, judge
from moeplace.profiling.errors import InputError
from moeplace.profiling.synthetic.traces import planted
from moeplace.profiling.traces.sampling import sequence_rows
from moeplace.profiling.traces.trace import RoutingTrace

RANKS, LAYERS, EXPERTS = 4, 2, 16
LINK = Link(latency=1e-6, bandwidth=1e9)  # slow, so that copies decide
TERMS = Terms(
    Cluster.uniform(RANKS, slots_per_rank=EXPERTS // RANKS, intra=LINK),
    StepShape(batch=64, hidden_size=512),
    Calibration(intra=LINK),
    seed=3,
)


def routing(seed: int, *, epsilon: float = 0.1, tokens: int = 4096, num_bytes: int | None = 1 << 20) -> RoutingTrace:
    shape = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "num_ranks": RANKS}
    trace, _ = planted(num_tokens=tokens, epsilon=epsilon, seed=seed, **shape)
    return trace if num_bytes is None else trace.replace(expert_bytes=np.full((LAYERS, EXPERTS), num_bytes))


def judges(trace: RoutingTrace) -> HeldOut:
    return HeldOut(trace.split("test"), seed=5, samples=6)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Searches here are short: compiling their kernels must not be part of them."""
    for mode in MODES:
        solve(TERMS.problem(routing(0, tokens=256), mode), time_limit=0.2)


def test_a_placement_that_pays_is_recommended() -> None:
    """Hidden blocks: the chosen mode's gain is that of its placement, the price is said, all options are there."""
    trace = routing(1)
    held_out = judges(trace)
    seen: list[float] = []
    verdict = judge(trace.split("train"), held_out, TERMS, time_limit=6.0, report=seen.append)
    assert verdict.is_worth_it
    assert [(option.mode, option.has_replicas) for option in verdict.options] == [
        (mode, wide) for mode in MODES for wide in (False, True)
    ]
    chosen = verdict.chosen
    assert chosen.over_baseline.low < chosen.over_baseline.share < chosen.over_baseline.high
    assert chosen.over_baseline.share > 0.1
    problem = TERMS.problem(trace.split("train"), chosen.mode)
    assert chosen.seconds == pytest.approx(held_out.evaluate(problem, chosen.placement).predicted_seconds)
    assert verdict.sentence.startswith(f"Run {chosen.mode} with a solved placement: a step is predicted to be ")
    assert "paid back after" in verdict.sentence
    assert f"{LAYERS} MiB more on a rank" in verdict.sentence
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    for option in verdict.options:  # replicas are never fitted worse than each expert once
        if option.over_plain is not None:
            plain = next(o for o in verdict.options if o.mode == option.mode and o.over_plain is None)
            assert option.fitted_seconds <= plain.fitted_seconds + 1e-12


def test_the_baseline_is_the_mode_that_suits_index_order_best() -> None:
    """By all held-out tokens, whatever samples of them say."""
    trace = routing(1, tokens=256)
    before = {mode: np.array([3.0, 1.0, 1.0]) for mode in MODES} | {"coherent": np.array([2.0, 9.0, 9.0])}
    ground = _Ground(trace, judges(trace), TERMS, TERMS.cluster, before)
    assert ground.baseline == "coherent"


def test_uniform_routing_is_left_alone() -> None:
    """Nothing to gain but balance by chance: the advice is to change nothing, with the figures."""
    trace = routing(2, epsilon=1.0, num_bytes=None)
    verdict = judge(trace.split("train"), judges(trace), TERMS, time_limit=3.0)
    assert not verdict.is_worth_it
    assert verdict.sentence.startswith(f"Leave the experts as they are and run {verdict.baseline}")
    assert "within noise" in verdict.sentence or "less than 2%" in verdict.sentence
    assert all(option.move_seconds is None and option.extra_bytes is None for option in verdict.options)


def test_ranks_that_need_replicas_have_no_plain_option() -> None:
    """More ranks than experts: only with redundant slots; without them there is nothing to judge."""
    trace, _ = planted(num_tokens=512, num_layers=1, num_experts=4, top_k=2, num_ranks=2, epsilon=0.0, seed=0)
    wide = replace(TERMS, cluster=Cluster.uniform(8, slots_per_rank=1))
    verdict = judge(trace.split("train"), judges(trace), wide, time_limit=1.0)
    assert [option.over_plain for option in verdict.options] == [None] * 3
    three = replace(TERMS, cluster=Cluster.uniform(3, slots_per_rank=1))
    with pytest.raises(InputError, match="3 slots per layer do not hold 4 experts"):
        judge(trace.split("train"), judges(trace), three, time_limit=1.0)


def test_intervals_follow_the_differences_between_sequences() -> None:
    """Equal placements differ by nothing; sequences that are all alike have no noise; a ratio is linearised."""
    trace = routing(1, tokens=1024)
    held_out = judges(trace)
    problem = TERMS.problem(trace, "dispatch-combine")
    base = TERMS.index_order(problem)
    assert gain(held_out.seconds(problem, base), held_out.seconds(problem, base), sequences=20) == Gain(0.0, 0.0, 0.0)
    twins = trace.select(np.tile(np.arange(128), 8)).replace(sequence_ids=np.repeat(np.arange(8), 128))
    better = Placement(
        np.roll(base.slot_to_expert, 2, axis=1), base.slots_of_rank, base.node_of_rank, base.experts_per_layer
    )
    same = HeldOut(twins, seed=0)
    found = same.gain(same.seconds(problem, base), same.seconds(problem, better))
    assert found.high - found.low < 1e-12
    whole = np.array([2.0, 2.1, 1.9])
    assert ratio(whole / 2, whole, sequences=20).share == 0.5
    assert ratio(whole / 2, whole, sequences=20).high == pytest.approx(0.5)
    with pytest.raises(InputError, match="no held-out tokens"):
        HeldOut(trace.select(slice(0, 0)), seed=0)


def test_long_traces_are_judged_by_whole_sequences() -> None:
    """About as many tokens as allowed, spread over the trace; without ids, pieces of 128 tokens."""
    trace = routing(1)
    held_out = HeldOut(trace, seed=0, samples=2, most_tokens=1000)
    assert 900 <= held_out.trace.num_tokens <= 1200
    assert held_out.trace.sequence_ids is not None
    counts = np.unique(held_out.trace.sequence_ids, return_counts=True)[1]
    assert (counts == 128).all()
    assert len(sequence_rows(trace.replace(sequence_ids=None))) == len(sequence_rows(trace))


def test_tokens_needed_are_found() -> None:
    """Blocks without noise are learnt from few tokens; subsets are nested, the last is everything."""
    trace = routing(1, epsilon=0.0)
    curve = learning_curve(
        trace.split("train"), judges(trace), TERMS, mode="dispatch-combine", tolerance=0.05, time_limit=3.0
    )
    tokens = [point.tokens for point in curve.points]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == trace.split("train").num_tokens
    assert curve.enough is not None
    assert curve.enough < tokens[-1]
    assert f"{curve.enough:,} tokens are enough" in curve.sentence
    assert curve.points[-1].gain.is_beyond_noise


def test_nothing_to_learn_is_said() -> None:
    """Uniform routing: no number of tokens is enough for a gain that is not there."""
    trace = routing(2, epsilon=1.0, tokens=2048)
    curve = learning_curve(
        trace.split("train"), judges(trace), TERMS, mode="dispatch-combine", tolerance=0.05, time_limit=1.2
    )
    assert "nothing that more tokens could be compared with" in curve.sentence or curve.points[-1].gain.share < 0.05


@pytest.mark.parametrize(
    ("shares", "tolerance", "expected"),
    [
        ((0.1, 0.19, 0.2), 0.05, 20),
        ((0.195, 0.1, 0.2), 0.05, None),
        ((0.195, 0.191, 0.2), 0.05, 10),
        ((0.2,), 0.1, None),
    ],
)
def test_enough_means_from_there_on(shares: tuple[float, ...], tolerance: float, expected: int | None) -> None:
    """One lucky small fit is not enough; the limit itself is."""
    points = [CurvePoint(10 * n, n, Gain(share, 0, 1), 2.0) for n, share in enumerate(shares, start=1)]
    assert enough_tokens(points, tolerance) == expected


def test_a_gain_survives_when_the_routing_stays() -> None:
    """The same blocks: all of it. Other blocks: next to nothing, and the advice to solve again."""
    trace, other = routing(1, tokens=8192), routing(2)
    first, second = trace.select(slice(0, 4096)), trace.select(slice(4096, 8192))
    arguments = {"mode": "dispatch-combine", "time_limit": 2.0}
    stays = carry_over(first, second.split("train"), judges(second), TERMS, **arguments)
    assert stays.surviving is not None
    assert stays.surviving.share > 0.9
    assert "keep the placement" in stays.sentence
    changed = carry_over(first, other.split("train"), judges(other), TERMS, **arguments)
    assert changed.surviving is not None
    assert changed.surviving.share < 0.3
    assert changed.refit.is_beyond_noise
    assert "solve again" in changed.sentence
    uniform = routing(3, epsilon=1.0, tokens=2048)
    nothing = carry_over(first, uniform.split("train"), judges(uniform), TERMS, **arguments)
    assert nothing.surviving is None or nothing.new.share < 0.05
