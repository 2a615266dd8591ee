"""The field's balancer: its golden instance, the published ratios, and no duplicates in ours."""

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.solvers.eplb import rebalance_experts, solve_eplb
from moeplace.profiling.errors import InputError, MoeplaceWarning

README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_HIERARCHICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
README_GLOBAL = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]


def zipf_load(layers: int, experts: int, seed: int) -> np.ndarray:
    """1,000,000 assignments per layer, probability 1/i, shuffled by layer."""
    rng = np.random.default_rng(seed)
    share_E = 1 / np.arange(1, experts + 1)
    return np.stack([np.round(rng.permutation(share_E / share_E.sum()) * 1e6) for _ in range(layers)])


def lognormal_load(layers: int, experts: int, seed: int) -> np.ndarray:
    """1,000,000 assignments per layer, exp of standard normals."""
    load_LE = np.exp(np.random.default_rng(seed).standard_normal((layers, experts)))
    return np.round(load_LE / load_LE.sum(axis=1, keepdims=True) * 1e6)


def ratios(load_LE: np.ndarray, slots_LS: np.ndarray, ranks: int) -> np.ndarray:
    """(L,) busiest rank over mean rank, loads split evenly over replicas."""
    out = []
    for load_E, row_S in zip(load_LE, slots_LS, strict=True):
        share_E = load_E / np.bincount(row_S, minlength=len(load_E))
        load_R = share_E[row_S].reshape(ranks, -1).sum(axis=1)
        out.append(load_R.max() / load_R.mean())
    return np.array(out)


def test_golden_instance_hierarchical() -> None:
    """The README's rows and replica counts, exactly; mean imbalance 1.2252."""
    slots_LS, counts_LE = rebalance_experts(README_LOAD, 16, 4, 2, 8)
    assert slots_LS.tolist() == README_HIERARCHICAL
    assert counts_LE.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert ratios(README_LOAD, slots_LS, 8).round(4).tolist() == [1.2081, 1.2422]


def test_golden_instance_global_with_its_duplicates() -> None:
    """The pure function keeps the peer's duplicates; the solver re-points them and says so."""
    assert rebalance_experts(README_LOAD, 16, 1, 1, 8)[0].tolist() == README_GLOBAL
    draft = solve_eplb(Problem.from_load(README_LOAD, Cluster.uniform(8, slots_per_rank=2)), Budget(1.0))
    assert draft.notes[0].startswith("2 slots")
    for row_S, peer_S in zip(draft.slot_to_expert, README_GLOBAL, strict=True):
        assert np.count_nonzero(row_S != peer_S) == 1
        assert all(len(set(pair)) == 2 for pair in row_S.reshape(8, 2).tolist())


def test_default_groups_are_the_nodes() -> None:
    """On two nodes the solver runs the hierarchical policy with one group per node."""
    problem = Problem.from_load(README_LOAD, Cluster.uniform(8, slots_per_rank=2, ranks_per_node=4))
    four = solve_eplb(problem, Budget(1.0), num_groups=4)
    assert four.slot_to_expert.tolist() == README_HIERARCHICAL
    peer_LS, _ = rebalance_experts(README_LOAD, 16, 2, 2, 8)
    draft = solve_eplb(problem, Budget(1.0))
    repointed = int(draft.notes[0].split()[0])
    assert np.count_nonzero(draft.slot_to_expert != peer_LS) == repointed > 0


@pytest.mark.parametrize(
    ("load", "shape", "policy", "expected"),
    [
        (zipf_load(58, 256, 0), (288, 32), (8, 4), (1.4173, 1.889)),
        (zipf_load(58, 256, 0), (288, 32), (1, 1), (1.0053, 1.008)),
        (lognormal_load(58, 256, 0), (288, 32), (8, 4), (1.0746, 1.298)),
        (lognormal_load(58, 256, 0), (288, 32), (1, 1), (1.0050, 1.009)),
        (zipf_load(26, 128, 1), (128, 8), (1, 1), (1.6552, 1.6552)),
        (lognormal_load(26, 128, 1), (128, 8), (1, 1), (1.0473, 1.508)),
    ],
)
def test_published_ratios(load, shape, policy, expected) -> None:  # type: ignore[no-untyped-def]
    """Measured peers, mean and worst layer (58 x 256 and 26 x 128 experts)."""
    slots_LS, _ = rebalance_experts(load, shape[0], *policy, shape[1])
    ratio_L = ratios(load, slots_LS, shape[1])
    assert ratio_L.mean() == pytest.approx(expected[0], abs=1.5e-4)
    assert ratio_L.max() == pytest.approx(expected[1], abs=1e-3)


@pytest.mark.parametrize(("slots", "experts"), [([3, 2, 1], 5), (4, 3), (3, 9), ([5, 1, 1], 3)])
def test_any_shape_gives_a_valid_placement(slots: int | list[int], experts: int) -> None:
    """Unequal slots, more slots than experts: no expert twice on a rank, every expert somewhere."""
    load_LE = np.random.default_rng(0).integers(1, 50, (4, experts)).astype(float)
    problem = Problem.from_load(load_LE, Cluster.uniform(3, slots_per_rank=slots))
    problem.placement(solve_eplb(problem, Budget(1.0)).slot_to_expert)


def test_numbers_that_do_not_divide_are_named() -> None:
    """Messages name the value and the rule; groups that do not divide by nodes degrade with a warning."""
    with pytest.raises(InputError, match=r"slots per layer \(15\) must be a multiple of ranks \(8\)"):
        rebalance_experts(README_LOAD, 15, 4, 2, 8)
    with pytest.raises(InputError, match=r"experts \(12\) must be a multiple of expert groups \(5\)"):
        rebalance_experts(README_LOAD, 16, 5, 2, 8)
    with pytest.raises(InputError, match="at least the experts"):
        rebalance_experts(README_LOAD, 8, 4, 2, 8)
    with pytest.warns(MoeplaceWarning, match="global policy"):
        assert rebalance_experts(README_LOAD, 16, 3, 2, 8)[0].tolist() == README_GLOBAL
