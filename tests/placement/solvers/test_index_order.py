"""What engines do without a plan, row by row."""

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.solvers import get_solver


@pytest.mark.parametrize(("slots", "name", "row"), [
    (2, "index-order", [0, 1, 2, 3, 4, -1]),
    (2, "round-robin", [0, 3, 1, 4, 2, -1]),
    (3, "round-robin", [0, 3, -1, 1, 4, -1, 2, -1, -1]),
    ([1, 3, 1], "round-robin", [0, 1, 3, 4, 2]),
    ([1, 1, 3], "index-order", [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_rows_by_hand(slots: int | list[int], name: str, row: list[int]) -> None:
    """Five experts on three ranks: in blocks as even as the slots allow, or in turn while a rank has room."""
    cluster = Cluster.uniform(3, slots_per_rank=slots)
    problem = Problem.from_load(np.ones((2, 5), np.int64), cluster)
    assert get_solver(name)(problem, Budget(1.0)).slot_to_expert.tolist() == [row, row]
