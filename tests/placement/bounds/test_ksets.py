"""Minorants of k-sets from their subsets: below every partition, exact at partitions, the same for whoever looks."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from moeplace.placement.bounds.dual import as_read, solve_dual
from moeplace.placement.bounds.ksets import UNIT
from moeplace.placement.bounds.relaxation import Layout, connectivity_slope, kset_slope
from moeplace.placement.bounds.replicated import Copies
from moeplace.placement.bounds.traffic import ksets_of
from moeplace.placement.verification.subsets import subset_pieces
from tests.placement.instances import skewed_trace
from tests.seeds import FIXED_AND_TODAY


def partitions(size: int, capacity: int) -> list[list[int]]:
    """Part of each element, for every partition into parts of at most `capacity`."""
    found = [[0]] if size else [[]]
    for _ in range(size - 1):
        found = [[*one, part] for one in found for part in range(max(one) + 2)]
    return [one for one in found if max(np.bincount(one)) <= capacity]


def near(seed: int, experts: int, *, few: bool) -> np.ndarray:
    """(E, E) symmetric uint8; `few` values make many subsets equal."""
    rng = np.random.default_rng(seed)
    z_8 = rng.choice([0, 51, 85, 128, 255], (experts, experts)) if few else rng.integers(0, 256, (experts, experts))
    z_8 = np.triu(z_8, 1)
    return (z_8 + z_8.T).astype(np.uint8)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("capacity", [2, 3, 6])
def test_no_partition_is_below_a_minorant(seed: int, capacity: int) -> None:
    """And some partition, or mixture of them, is close: within 1 % of the best minorant there is, a linear program."""
    size, gaps = 6, []
    all_P = partitions(size, capacity)
    pairs = list(itertools.combinations(range(size), 2))
    together_PX = np.array([[one[a] == one[b] for a, b in pairs] for one in all_P], float)
    parts_P = np.array([max(one) + 1.0 for one in all_P])
    for turn in range(25):
        z = np.random.default_rng([seed, turn]).choice(all_P, 3)
        mixed_X = np.mean([[one[a] == one[b] for a, b in pairs] for one in z], axis=0)
        z_EE = np.zeros((size, size))
        for (a, b), value in zip(pairs, mixed_X, strict=True):
            z_EE[a, b] = z_EE[b, a] = value
        constant, gain = kset_slope(np.arange(size)[None], np.ones(1), size, capacity)(z_EE)
        slope_X = np.array([2 * gain[a, b] for a, b in pairs])
        assert (slope_X >= 0).all()
        assert (constant - together_PX @ slope_X <= parts_P + 1e-9).all()
        best = linprog(parts_P, together_PX.T, mixed_X, np.ones((1, len(parts_P))), [1.0]).fun
        assert constant - mixed_X @ slope_X <= best + 1e-4
        gaps.append(1 - (constant - mixed_X @ slope_X) / best)
    assert np.mean(gaps) < 0.01


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
def test_minorants_touch_at_layouts(top_k: int, dated_seed: int) -> None:
    """At the matrix of a partition the minorants add up to its ranks per token."""
    rng = np.random.default_rng(dated_seed)
    trace = skewed_trace(dated_seed, experts=12, top_k=top_k, ragged=0.2, tokens=150)
    sets_UK, share_U = ksets_of(trace.layer(0))
    rank_E = rng.permutation(np.repeat(np.arange(3), 4))
    together = (rank_E[:, None] == rank_E).astype(float)
    constant, gain = kset_slope(sets_UK, share_U, 12, 4)(together)
    np.fill_diagonal(together, 0.0)
    used = [len(set(rank_E[row[row >= 0]])) for row in sets_UK]
    assert constant - (gain * together).sum() == pytest.approx(float(share_U @ used))


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_the_verifier_picks_the_same(seed: int, few: bool, top_k: int) -> None:
    """Of many that are equal too, and where a token has fewer experts."""
    ids_TK = skewed_trace(seed, experts=16, top_k=top_k, ragged=0.3, tokens=200).layer(0)
    z_8 = near(seed, 16, few=few)
    for capacity in (2, 5, 16):
        sets_UK, share_U = ksets_of(ids_TK)
        ours = kset_slope(sets_UK, share_U, 16, capacity)(as_read(z_8))
        theirs = subset_pieces(np.sort(sets_UK, axis=1), share_U, z_8, capacity)
        assert theirs[0] == pytest.approx(ours[0], abs=1e-12)
        np.testing.assert_allclose(theirs[1], ours[1], atol=1e-12)


def test_a_written_matrix_is_whole() -> None:
    """What a certificate writes for z is a whole number of units, whatever way it is computed."""
    z_8 = np.arange(256, dtype=np.uint8)
    assert (np.rint(UNIT * as_read(z_8)) == 64 * z_8.astype(int) + 1).all()
    assert np.abs(UNIT * as_read(z_8) - np.rint(UNIT * as_read(z_8))).max() < 1e-9


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_subsets_prove_more_than_pieces_by_expert(seed: int) -> None:
    """On the same layouts, with and without replicas, by a clear margin."""
    sets_UK, share_U = ksets_of(skewed_trace(seed, experts=24, top_k=5, tokens=600).layer(0))
    for layout, capacity in ((Layout(1, 24, 4, 6, True), 6), (Copies(24, 4, 7, 28, True), 7)):
        inverse, subsets = (
            solve_dual(layout, make(sets_UK, share_U, 24, capacity), iterations=150, step=12.0).bound
            for make in (connectivity_slope, kset_slope)
        )
        assert subsets > inverse + 0.02
