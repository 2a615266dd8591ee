"""Rows move into messages and out of them alike on the host and by device operators, into memory that is kept."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.comm.watch import CollectiveWatch
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.moves import KEPT_BYTES, DeviceMoves, HostMoves
from moeplace.runtime.exchange.row_layout import META_WIDTH, RowLayout
from moeplace.runtime.exchange.rows import Outgoing, RowExchange, TokenCopies
from tests.rank_pool import RankContext, RankPool

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def both_moves() -> tuple[HostMoves, DeviceMoves]:
    return HostMoves(), DeviceMoves(torch.device("cpu"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_both_forms_give_the_same_bytes(dtype: torch.dtype, rows: int, dated_seed: int) -> None:
    """A message is filled, read and joined with rows of this rank: what comes out is what indexing says."""
    rng = np.random.default_rng(dated_seed)
    generator = torch.Generator().manual_seed(dated_seed)
    x, weights = (torch.randn(7, width, generator=generator).to(dtype) for width in (5, 3))
    layout = RowLayout.of_tokens(3, weights=weights, x=x)
    filled = rng.permutation(rows)[: rng.integers(rows + 1)]
    source = rng.integers(0, 7, len(filled))
    heads = rng.integers(0, 99, (rows, layout.head_words)).astype(np.int32)
    kept = rng.permutation(7)[:4]
    results = []
    for moves in both_moves():
        message = moves.room("m", rows, layout.row_bytes)
        moves.pack(message, layout, heads, filled, source, {"weights": weights, "x": x})
        np.testing.assert_array_equal(moves.heads(message, layout), heads)
        joined = [
            moves.join(own, index, message, layout.fields[name], filled)
            for name, own in (("x", x), ("weights", weights))
            for index in (None, kept)
        ]
        results.append(joined)
    place = torch.from_numpy(source)
    expected = [torch.cat([own[index], own[place]]) for own in (x, weights) for index in (slice(None), kept)]
    for host, device, wanted in zip(*results, expected, strict=True):
        assert host.dtype == device.dtype == dtype
        assert torch.equal(host, wanted)
        assert torch.equal(device, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, *TYPES])
def test_memory_is_kept(dtype: torch.dtype) -> None:
    """The same memory by the same name, also for a smaller message; other names have their own; large ones none."""
    for moves in both_moves():
        first = moves.room("a", 40, 6, dtype)
        assert first.shape == (40, 6)
        assert first.dtype == dtype
        assert moves.room("a", 3, 6, dtype).data_ptr() == first.data_ptr()
        assert moves.room("b", 3, 6, dtype).data_ptr() != first.data_ptr()
        assert moves.room("a", 41, 6, dtype).shape == (41, 6)
        large = KEPT_BYTES // dtype.itemsize + 1
        moves.room("a", 1, large, dtype)
        assert all(len(kept) <= KEPT_BYTES for kept in moves._kept.values())


def test_head_words_end_where_other_types_begin() -> None:
    """The head is what the host knows: meta and slots, with the padding behind them."""
    for top_k, words in ((1, META_WIDTH + 2), (2, META_WIDTH + 2), (3, META_WIDTH + 4), (6, META_WIDTH + 6)):
        x = torch.empty(0, 4)
        assert RowLayout.of_tokens(top_k, weights=x, x=x).head_words == words


def test_memory_in_use_is_not_given_again() -> None:
    """An exchange that was not finished keeps its memory: who starts the next one is at fault."""
    group = RankGroup(dist.HashStore(), rank=0, size=1, timeout=20)
    exchange = RowExchange(group, HostMoves(), kind="dispatch")
    x = torch.ones(2, 4)
    copies = TokenCopies(np.arange(2), np.zeros((2, 1), np.int64), {"weights": x[:, :1], "x": x})
    outgoing = Outgoing.of(np.zeros((2, 1), bool))

    def start() -> object:
        return exchange.start(copies.layout(), copies, outgoing, capacity=Capacity([1], [1]))

    first = start()
    with pytest.raises(AssertionError, match="has not been finished"):
        start()
    first.finish()  # type: ignore[attr-defined]
    start()
    group.close()


class GivenUp:
    """A collective that was given up."""

    def is_completed(self) -> bool:
        raise RuntimeError("aborted")


class HangingMoves(HostMoves):
    """A read of the heads hangs, as a GPU's does, until the watch gives the message up: then it has any numbers."""

    def __init__(self, watch: CollectiveWatch) -> None:
        super().__init__()
        self._watch = watch

    def heads(self, message: torch.Tensor, layout: RowLayout) -> np.ndarray:
        self._watch.add(GivenUp(), "dispatch")
        self._watch.look()
        return np.full_like(super().heads(message, layout), -7)


def exchange_with_nobody_left(context: RankContext) -> str:
    """What a rank is told whose peers go while it waits for their rows."""
    group, x = context.group(), torch.ones(2, 4)
    group._watch = watch = CollectiveWatch(lambda: None, timeout=20, start=False)
    exchange = RowExchange(group, HangingMoves(watch), kind="dispatch")
    copies = TokenCopies(np.arange(2), np.zeros((2, 1), np.int64), {"weights": x[:, :1], "x": x})
    outgoing = Outgoing.of(np.arange(group.size)[None, :] == [[1 - group.rank]] * 2)
    pending = exchange.start(copies.layout(), copies, outgoing, capacity=Capacity([2, 2], [2, 2]))
    try:
        pending.finish()
    except PeerLostError as error:
        return str(error)
    return ""


def test_numbers_of_a_message_that_was_given_up_are_not_used(pool: RankPool) -> None:
    """Whatever they say: the rank hears that a peer is lost, not that its numbers are wrong."""
    for told in pool.run(exchange_with_nobody_left, size=2):
        assert "dispatch failed: aborted" in told
