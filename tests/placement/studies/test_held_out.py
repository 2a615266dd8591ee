"""Held-out judgement: intervals hold what they promise, and few sequences are not trusted."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.studies.held_out import FEW_SEQUENCES, HeldOut, interval
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import TODAY


@pytest.mark.parametrize("sequences", [3, 8, 40])
@pytest.mark.parametrize("seed", [0, TODAY])
def test_intervals_hold_the_truth_in_nineteen_of_twenty_cases(seed: int, sequences: int) -> None:
    """Means of normal sequences, 32 bootstrap samples: 400 intervals, of which 90 to 98.5 % hold the true mean."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(400):
        values_Q = rng.standard_normal(sequences)
        samples = values_Q[rng.integers(0, sequences, (32, sequences))].mean(axis=1)
        found = interval(np.concatenate([[values_Q.mean()], samples]), sequences=sequences)
        held += found.low <= 0 <= found.high
    assert 0.9 <= held / 400 <= 0.985


def test_one_sequence_makes_no_gain_beyond_noise() -> None:
    """20 random placements on one held-out sequence: some are better, none beyond noise, and the note says why."""
    trace = skewed_trace(3, tokens=300, layers=2, experts=8, top_k=2).replace(sequence_ids=np.zeros(300, np.int64))
    held_out = HeldOut(trace, seed=0)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=2))
    rng = np.random.default_rng(0)
    placements = [random_placement(rng, layers=2, experts=8, slots_of_rank=[2] * 4) for _ in range(21)]
    before, *others = (held_out.seconds(problem, placement) for placement in placements)
    gains = [held_out.gain(before, after) for after in others]
    assert any(gain.share > 0 for gain in gains)
    assert not any(gain.is_beyond_noise for gain in gains)
    assert gains[0].span == "not known from one sequence"
    assert "Held-out sequences: 1" in held_out.note


def test_enough_sequences_need_no_note() -> None:
    """The word on few sequences ends where there are eight."""
    trace = skewed_trace(3, tokens=160, layers=1, experts=4)
    for count in (FEW_SEQUENCES - 1, FEW_SEQUENCES):
        held_out = HeldOut(trace.replace(sequence_ids=np.arange(160) % count), seed=0)
        assert bool(held_out.note) == (count < FEW_SEQUENCES)
