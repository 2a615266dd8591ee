"""RoutingStats against numpy one-liners."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.stats import RoutingStats, distinct_ksets
from tests.profiling.builders import random_ids

shapes = st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(2, 6), st.integers(1, 4))


def ragged_ids(shape: tuple[int, int, int, int], seed: int) -> np.ndarray:
    """(T, L, K) distinct ids below E with some -1 and some null experts (ids E and E+1)."""
    tokens, layers, experts, top_k = shape
    rng = np.random.default_rng(seed)
    ids_TLK = random_ids(rng, tokens, layers, experts + 2, min(top_k, experts + 2))
    ids_TLK[rng.random(ids_TLK.shape) < 0.2] = -1
    return ids_TLK


@given(shapes, st.integers(0, 99))
def test_counts_equal_their_definitions(shape: tuple[int, int, int, int], seed: int) -> None:
    """Load, transitions and co-activation equal dense one-hot products; null experts and -1 count nowhere."""
    experts = shape[2]
    ids_TLK = ragged_ids(shape, seed)
    stats = RoutingStats.from_ids(ids_TLK, np.full(shape[1], experts), threads=2)
    one_hot_TLKE = ids_TLK[..., None] == np.arange(experts)
    member_TLE = one_hot_TLKE.any(2).astype(int)
    primary_TLE = one_hot_TLKE[:, :, 0].astype(int)
    assert np.array_equal(stats.load, member_TLE.sum(0))
    assert np.array_equal(stats.transitions, np.einsum("tli,tlj->lij", primary_TLE[:, :-1], primary_TLE[:, 1:]))
    pairs_LEE = np.einsum("tle,tlf->lef", member_TLE, member_TLE) * (1 - np.eye(experts, dtype=int))
    assert np.array_equal(stats.coactivation, pairs_LEE)
    assert stats.num_tokens == len(ids_TLK)


@given(shapes, st.integers(0, 99), st.integers(0, 40))
def test_merge_is_concatenation(shape: tuple[int, int, int, int], seed: int, cut: int) -> None:
    """Stats of two pieces merge into the stats of the whole, wherever it is cut."""
    ids_TLK, experts_L = ragged_ids(shape, seed), np.full(shape[1], shape[2])
    parts = [RoutingStats.from_ids(piece, experts_L) for piece in (ids_TLK[:cut], ids_TLK[cut:])]
    assert parts[0].merge(parts[1]).equals(RoutingStats.from_ids(ids_TLK, experts_L))


def test_decayed_window_weighs_steps_geometrically() -> None:
    """After n steps, step i counts factor^(n-1-i) times."""
    experts_L = np.array([2])
    window = RoutingStats.empty(experts_L)
    for expert in (0, 1, 1):
        window = window.decayed(0.5).merge(RoutingStats.from_ids(np.full((4, 1, 1), expert), experts_L))
    assert window.load.tolist() == [[1.0, 6.0]]
    assert window.num_tokens == 7.0


def test_unequal_layers_and_bad_arguments() -> None:
    """Ids beyond a smaller layer's experts are null there; shapes and factors that do not fit are named."""
    stats = RoutingStats.from_ids(np.array([[[2], [1]], [[0], [2]]]), np.array([3, 2]))
    assert stats.load.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert stats.transitions[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(InputError, match=r"decay factor \(1.5\)"):
        stats.decayed(1.5)
    with pytest.raises(InputError, match="cannot be merged"):
        stats.merge(RoutingStats.empty(np.array([3, 3])))
    with pytest.raises(InputError, match=r"shape \(tokens, 2, top-k\)"):
        RoutingStats.from_ids(np.zeros((1, 3, 1), int), np.array([3, 2]))


@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from([3, 12, 300, 20000]), st.integers(0, 99))
def test_distinct_ksets_are_the_sets(tokens: int, top_k: int, experts: int, seed: int) -> None:
    """The sets with their counts are the multiset of the rows, read as sets."""
    rng = np.random.default_rng(seed)
    ids_TK = rng.integers(-1, min(experts, 3), (tokens, top_k)) * (experts // 3)
    ids_TK[ids_TK < 0] = -1
    sets_UK, counts_U = distinct_ksets(ids_TK)
    rows: dict[tuple[int, ...], int] = {}
    for row in ids_TK.tolist():
        key = tuple(sorted(row, key=lambda e: (e < 0, e)))
        rows[key] = rows.get(key, 0) + 1
    assert {tuple(s): c for s, c in zip(sets_UK.tolist(), counts_U.tolist(), strict=True)} == rows
