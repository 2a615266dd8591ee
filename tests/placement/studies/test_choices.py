"""What studies conclude from figures, each at its limit: which option is chosen, what is said, what it costs."""

from dataclasses import replace

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import index_order
from moeplace.placement.studies import carry_over, learning_curve, verdict
from moeplace.placement.studies.held_out import Gain, gain, interval, ratio
from moeplace.placement.studies.verdict import WORTH_HAVING, Option, Terms
from tests.placement.instances import skewed_trace

PLACEMENT = index_order(np.full(1, 4), np.full(2, 2), np.zeros(2, int))
SURE, NOISE, SMALL = Gain(0.2, 0.1, 0.3), Gain(0.2, -0.1, 0.5), Gain(WORTH_HAVING / 2, 1e-4, WORTH_HAVING)


def option(mode: str, fitted: float, over_plain: Gain | None = None, over_baseline: Gain = SURE) -> Option:
    made = Option(
        mode="coherent", slots_per_rank=3, has_replicas=over_plain is not None, index_order_seconds=2.0,
        fitted_seconds=fitted, seconds=fitted, gain=SURE, over_baseline=over_baseline, over_plain=over_plain,
        ranks_per_token=1.0, imbalance=1.0, move_seconds=None, payback_steps=None, extra_bytes=None, status="feasible",
        placement=PLACEMENT,
    )  # fmt: skip
    return replace(made, mode=mode)  # type: ignore[arg-type]


def test_replicas_are_chosen_where_they_are_worth_their_memory() -> None:
    """The mode by the shortest fitted step without replicas; then replicas of that mode, if beyond noise and limit."""
    slow, fast = option("coherent", 1.0), option("allgather", 0.9)
    for extra, is_taken in (
        (SURE, True), (NOISE, False), (SMALL, False), (Gain(WORTH_HAVING, 1e-9, 1.0), True),
        (Gain(WORTH_HAVING, 0.0, 1.0), False),
    ):  # fmt: skip
        wide, other = option("allgather", 0.8, extra), option("coherent", 0.1, SURE)
        assert verdict._choose([slow, other, fast, wide]) is (wide if is_taken else fast)


def test_the_verdict_says_what_decided() -> None:
    """Whether and why not; what replicas bring at which memory; when a move is paid back, whole steps."""
    plain = replace(option("coherent", 1.0), move_seconds=1.25, payback_steps=10.1)
    wide = replace(option("coherent", 0.9, NOISE), slots_per_rank=5, extra_bytes=3 * 2**20)
    stay = list(verdict._sentences([plain], replace(plain, over_baseline=NOISE), "allgather", False))
    assert stay == [
        "Leave the experts as they are and run allgather: the placement found for coherent would change a step by "
        "20.0% (95 % interval -10.0% to 50.0%), which is within noise."
    ]
    small = list(verdict._sentences([plain], replace(plain, over_baseline=SMALL), "allgather", False))
    assert f"which is less than {WORTH_HAVING:.0%}" in small[0]
    run, replicas, move = verdict._sentences([option("allgather", 1.0, SURE), wide, plain], plain, "allgather", True)
    assert run.startswith("Run coherent with a solved placement: a step is predicted to be 20.0% (95 %")
    assert replicas == (
        "Replicas in 5 slots per rank, 3 MiB more on a rank, change it by 20.0% (-10.0% to 50.0%) and are not worth it."
    )
    assert "takes about 1.25 s, paid back after 11 steps" in move
    used = list(verdict._sentences([plain, replace(wide, extra_bytes=None)], wide, "allgather", True))
    assert len(used) == 2
    assert used[1].startswith("Replicas in 5 slots per rank change it")
    assert used[1].endswith("and are used.")


def test_clusters_of_a_verdict() -> None:
    """Each expert once, where every rank gets one; wide as given where that is wide, else a slot more."""

    def terms(slots: int | list[int], ranks: int = 2) -> Terms:
        return Terms(Cluster.uniform(ranks, slots_per_rank=slots), StepShape(), Calibration(), seed=0)

    plain = terms(3).plain_cluster(4)
    assert plain is not None
    assert plain.slots_of_rank.tolist() == [2, 2]
    assert terms(3, 5).plain_cluster(4) is None
    assert terms(3).wide_cluster(4).slots_of_rank.tolist() == [3, 3]
    assert terms(2).wide_cluster(4).slots_of_rank.tolist() == [3, 3]


def test_memory_of_replicas_counts_real_experts() -> None:
    """Two slots more on a rank at the mean size of each layer's experts; a layer with fewer has no size beyond them."""
    trace = skewed_trace(0, layers=2, experts=4).replace(expert_bytes=np.array([[1, 2, 3, 2], [10, 10, 20, 20]]))
    few, more = Cluster.uniform(2, slots_per_rank=2), Cluster.uniform(2, slots_per_rank=[3, 4])
    assert verdict._extra_bytes(trace, few, more) == 2 * (2 + 15)
    assert verdict._extra_bytes(trace, few, few) == 0
    assert verdict._extra_bytes(trace.replace(expert_bytes=None), few, more) is None
    less = trace.replace(topk_ids=np.zeros((9, 2, 1), int), experts_per_layer=np.array([4, 3]))
    assert verdict._extra_bytes(less, few, more) == int(2 * (2 + 40 / 3))


@pytest.mark.parametrize("sequences", [2, 9])
def test_intervals_by_hand(sequences: int) -> None:
    """Student's t with a degree per sequence but one, widened; the share is that on all tokens, not of the samples."""
    student = {2: 12.7062, 9: 2.3060}[sequences]
    before, after = np.array([2.0, 2.0, 4.0, 5.0]), np.array([1.0, 1.5, 2.0, 3.0])
    spread = student * np.sqrt(sequences / (sequences - 1)) * np.std([0.25, 0.5, 0.4], ddof=1)
    made = gain(before, after, sequences=sequences)
    assert (made.share, made.low, made.high) == pytest.approx((0.5, 0.5 - spread, 0.5 + spread), rel=1e-4)
    assert made.is_beyond_noise == (spread < 0.5)
    # part / whole = 0.5, and to first order 0.5 + (part - 1 - 0.5 (whole - 2)) / 2 in the samples.
    spread = student * np.sqrt(sequences / (sequences - 1)) * np.std([0.75, 0.5, 0.75], ddof=1)
    made = ratio(after, before, sequences=sequences)
    assert (made.share, made.low, made.high) == pytest.approx((0.5, 0.5 - spread, 0.5 + spread), rel=1e-4)


def test_one_sequence_or_sample_has_no_interval() -> None:
    """Nothing is beyond noise then."""
    for values, sequences in ((np.array([0.5, 0.4, 0.6]), 1), (np.array([0.5, 0.4]), 9)):
        made = interval(values, sequences=sequences)
        assert (made.share, made.low, made.high) == (0.5, -np.inf, np.inf)
        assert not made.is_beyond_noise
        assert made.span == "not known from one sequence"
    assert interval(np.array([0.5, 0.4, 0.6]), sequences=2).span != "not known from one sequence"
    assert not Gain(0.1, 0.0, 0.2).is_beyond_noise


def test_the_curve_says_how_many_tokens() -> None:
    """Nothing to gain; enough; too short, by how much is missing at half of the tokens; a single fit."""
    points = [learning_curve.CurvePoint(1000 * n, n, each, 2.0) for n, each in ((1, Gain(0.1, 0.05, 0.2)), (4, SURE))]
    noise = [*points[:1], replace(points[1], gain=NOISE)]
    assert "gains 20.0%, within noise" in learning_curve._sentence(noise, 0.05, None)
    assert learning_curve._sentence(points, 0.05, 1000).startswith("1,000 tokens are enough: from there on")
    assert "its train side is a single sequence" in learning_curve._sentence(points[1:], 0.05, None)
    short = learning_curve._sentence(points, 0.05, None)
    assert "with 1,000 instead of 4,000 tokens 50% of the gain are missing, more than 5%" in short
    assert "Record at least 8,000 tokens" in short


def test_what_survives_and_what_to_do() -> None:
    """Solve again where fitting anew saves enough, and surely; else keep."""
    gains = [Gain(0.1, 0.05, 0.15), SURE]
    assert "nothing that could survive" in carry_over._sentence(gains, None, SURE)
    for refit, advice in ((SURE, "solve again"), (NOISE, "keep the placement"), (SMALL, "keep the placement"),
                          (Gain(WORTH_HAVING, 1e-9, 1.0), "solve again")):  # fmt: skip
        said = carry_over._sentence(gains, Gain(0.5, 0.4, 0.6), refit)
        assert said.endswith(f"{advice}.")
        assert "gains 10.0% on the new one, one fitted to the new one 20.0%: 50% (40.0% to 60.0%)" in said
