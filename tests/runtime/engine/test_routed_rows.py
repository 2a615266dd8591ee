"""Recent routing: rows that several ranks saw become the tokens that one rank would have seen."""

from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.windows.load import LoadWindow
from moeplace.runtime.engine.windows.rows import RecentRows, RoutedRows, join_rows
from tests.profiling.builders import random_ids
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.placements import random_placement

LAYERS, EXPERTS = 3, 5


def routed_by(context: RankContext, path: Path, mode: str) -> bytes:
    """What a rank saw while it served six requests."""
    group = context.group()
    limits = EngineLimits(recent_ids=1000)
    engine = Engine(
        path, random_placement(LAYERS, EXPERTS, context.size, seed=3), mode=mode, group=group, limits=limits
    )
    engine.generate([Request(str(n), tuple(range(1, 2 + n)), max_new_tokens=4, stop_ids=()) for n in range(6)])
    assert engine.window.recent is not None
    return engine.window.recent.snapshot().to_bytes()


@pytest.mark.parametrize("mode", ["coherent", "dispatch-combine", "allgather"])
def test_ranks_together_see_what_one_rank_sees(pool: RankPool, tmp_path: Path, mode: str) -> None:
    """Tokens that change ranks between layers are put together again; sequences keep their tokens in order."""
    save_checkpoint("mixtral", tmp_path)
    traces = []
    for size in (1, 3):
        parts = [RoutedRows.from_bytes(content) for content in pool.run(routed_by, tmp_path, mode, size=size)]
        traces.append(join_rows(parts, np.full(LAYERS, EXPERTS)))
    assert traces[0].num_tokens == sum(range(1, 7)) + 6 * 3  # prompts, and all but the last new token
    assert traces[0].equals(traces[1])


def split_at_random(ids_TLK: np.ndarray, sequences_T: np.ndarray, *, ranks: int, keep: int, seed: int) -> RoutingTrace:
    """Passes of ten tokens, every token with a random rank in every layer; each rank drops what is too old."""
    rng = np.random.default_rng(seed)
    recent = [RecentRows(ids_TLK.shape[1], keep=keep) for _ in range(ranks)]
    for start in range(0, len(ids_TLK), 10):
        batch = slice(start, start + 10)
        for rows in recent:
            rows.begin_pass(sequences_T[batch])
        for layer in range(ids_TLK.shape[1]):
            rank_T = rng.integers(0, ranks, len(sequences_T[batch]))
            for rank, rows in enumerate(recent):
                token = np.flatnonzero(rank_T == rank)
                rows.record(layer, ids_TLK[batch][token, layer], token)
    return join_rows([rows.snapshot() for rows in recent], np.full(ids_TLK.shape[1], 8))


@pytest.mark.parametrize("keep", [1, 35, 1000])
def test_the_last_passes_are_kept_whole(keep: int) -> None:
    """At least as many tokens as asked for, where there are so many, and no pass in part."""
    ids_TLK = random_ids(np.random.default_rng(1), 95, 4, 8, 2)
    sequences_T = np.arange(95) % 7
    joined = split_at_random(ids_TLK, sequences_T, ranks=3, keep=keep, seed=2)
    kept = {1: 5, 35: 35, 1000: 95}[keep]
    order = np.argsort(sequences_T[95 - kept :], kind="stable")
    expected = RoutingTrace(ids_TLK[95 - kept :][order], np.full(4, 8), sequence_ids=sequences_T[95 - kept :][order])
    assert joined.equals(expected)


def test_a_token_that_is_missing_in_a_layer_is_left_out() -> None:
    """A rank that answered a step early has no later rows: the others' tokens remain."""
    rows = RecentRows(2, keep=10)
    rows.begin_pass(np.array([4, 5]))
    rows.record(0, np.array([[1], [2]]), np.array([0, 1]))
    rows.record(1, np.array([[3]]), np.array([1]))
    joined = join_rows([rows.snapshot()], np.array([4, 4]))
    assert joined.topk_ids.tolist() == [[[2], [3]]]
    assert joined.sequence_ids is not None
    assert joined.sequence_ids.tolist() == [5]
    rows.clear()
    assert join_rows([rows.snapshot()], np.array([4, 4])).num_tokens == 0


def test_what_is_not_routed_rows_is_refused() -> None:
    """Damaged bytes, no part, and another model."""
    with pytest.raises(FormatError, match="3 bytes are not routed rows"):
        RoutedRows.from_bytes(b"abc")
    with pytest.raises(InputError, match="at least one part"):
        join_rows([], np.array([4]))
    with pytest.raises(InputError, match="2 layers do not belong to a model of 1"):
        join_rows([RecentRows(2, keep=1).snapshot()], np.array([4]))


def test_a_window_is_bounded_whatever_passes_through() -> None:
    """Long prefills, far more than is kept: loads are exact, and what waits or is kept stays below its bounds."""
    tokens, top_k, keep = 2048, 8, 5000
    window = LoadWindow(LAYERS, 60, keep=keep)
    assert window.recent is not None
    rng, expected, most = np.random.default_rng(1), np.zeros((LAYERS, 60), np.int64), 0
    for _ in range(150):
        window.recent.begin_pass(np.zeros(tokens, np.int64))
        for layer in range(LAYERS):
            ids = rng.integers(-1, 60, (tokens, top_k))
            expected[layer] += np.bincount(ids[ids >= 0], minlength=60)
            window.record(layer, ids, np.arange(tokens))
        most = max(most, sum(ids.nbytes for _, ids in window._pending))
        kept = [part for one in window.recent._passes for layer in one.rows for pair in layer for part in pair]
        assert sum(part.nbytes for part in kept) <= (keep + tokens) * LAYERS * (2 * top_k + 4)
    assert most <= 8 << 20
    np.testing.assert_array_equal(window.load, expected)
