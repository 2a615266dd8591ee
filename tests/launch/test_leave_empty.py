"""`--leave-empty` reaches the problem that is solved."""

import argparse

import numpy as np
import pytest

from moeplace.launch.commands import solve
from moeplace.launch.options.problem import build_cluster, problem_options
from moeplace.placement.problem import Problem
from moeplace.placement.search.ties import ties_of
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.spare import use_all_slots
from tests.placement.instances import skewed_trace


@pytest.mark.parametrize("flags", [[], ["--leave-empty"]])
def test_slots_stay_empty_only_where_that_was_asked_for(flags: list[str]) -> None:
    """A plan that leaves a slot of each rank empty is filled by default, and handed in as it is with the flag."""
    trace = skewed_trace(3, tokens=200, layers=2, experts=12, top_k=2)
    parser = argparse.ArgumentParser()
    solve.add_arguments(parser)
    args = parser.parse_args(["t.npz", "--ranks", "4", "--slots-per-rank", "4", "--objective", "traffic", *flags])
    cluster = build_cluster(args, 12)
    problem = Problem.from_trace(trace, cluster, **problem_options(args, trace, cluster))
    sparse_LS = np.array([[0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1]] * 2, np.int32)
    judge = Judge(problem, ties_of(problem), None)
    found_LS, _ = use_all_slots(problem, [sparse_LS], None, judge, judge.best, np.random.default_rng(0))
    assert int((found_LS < 0).sum()) == (8 if flags else 0)
