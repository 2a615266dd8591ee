"""Very long traces are searched on some of their tokens; what is promised holds for all of them."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.search.layout import packed_start, to_slots
from moeplace.placement.solvers.layer import search
from moeplace.placement.solvers.layer.search import Effort, LayerSearch
from tests.placement.instances import skewed_trace
from tests.seeds import FIXED_AND_TODAY


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_thinned_tokens_keep_the_cap_of_all_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token in eight is searched: the cap holds for all of them, and traffic falls below that of packing."""
    monkeypatch.setattr(search, "MOST_TOKENS", 250)
    trace = skewed_trace(seed, tokens=2000, layers=1, experts=16, top_k=3)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=4), objective="traffic", max_imbalance=1.1)
    _, slots_S = LayerSearch(problem, 0, 1.1, 0.0, np.zeros(1, np.uint8)).run(Effort(), np.random.default_rng(seed))
    found = problem.evaluate(problem.placement(slots_S[None]))
    packed = problem.evaluate(problem.placement(to_slots(packed_start(problem, 0), 16)[None]))
    assert found.imbalance_worst <= max(1.1, packed.imbalance_worst) + 1e-9
    assert found.ranks_per_token < packed.ranks_per_token
