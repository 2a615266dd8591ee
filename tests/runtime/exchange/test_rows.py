"""Rows between ranks: whoever is to have a copy gets it, in order, whatever there was room for; nobody else does."""

from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.moves import make_moves
from moeplace.runtime.exchange.rows import OVERFLOW, SPREAD, Outgoing, RowExchange, TokenCopies
from tests.runtime.thread_ranks import run_groups

TOP_K = 3


@pytest.mark.parametrize("short", [None, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_copies_arrive_in_order(short: bool | None, size: int, dated_seed: int) -> None:
    """Three exchanges in the same memory, of random copies with random room, none at all too: token, slots, values,
    numbers for every other rank and flags are those of the sender; what exceeds the room follows in a round more, of
    which all ranks know; nothing goes to oneself."""
    rng = np.random.default_rng(dated_seed)
    tokens_R = rng.integers(0, 6, size)
    turns = []
    for _ in range(3):
        wanted = [rng.random((tokens, size)) < 0.5 for tokens in tokens_R]
        for rank, wanted_MR in enumerate(wanted):
            wanted_MR[:, rank] = False
        turns.append((wanted, rng.integers(0, 4, (size, size)), rng.integers(0, 2, size) * SPREAD))
    slots_R = [rng.integers(-1, 9, (tokens, TOP_K)) for tokens in tokens_R]

    def act(group: RankGroup) -> list[Any]:
        rank, found = group.rank, []
        tokens, moves = int(tokens_R[rank]), make_moves(group.device)
        exchange = RowExchange(group, moves, kind="dispatch")
        for wanted, rooms_RR, flags in turns:
            name = torch.arange(tokens) + 100 * rank
            values = {"weights": name[:, None] + torch.zeros(TOP_K), "x": name[:, None] + torch.arange(5.0)}
            copies = TokenCopies(name.numpy(), slots_R[rank], values)
            capacity = Capacity(rooms_RR[rank].tolist(), rooms_RR[:, rank].tolist())
            outgoing = Outgoing.of(wanted[rank])
            pending = exchange.start(
                copies.layout(), copies, outgoing, capacity=capacity, flags=int(flags[rank]), extra=7 * rank
            )
            got = pending.finish()
            x = got.join(moves, values["x"][:0], None, "x")
            weights = got.join(moves, values["weights"][:0], None, "weights")
            assert torch.equal(x, torch.from_numpy(got.token)[:, None] + torch.arange(5.0))
            assert torch.equal(weights, torch.from_numpy(got.token)[:, None] + torch.zeros(TOP_K))
            assert (got.source() == got.token // 100).all()
            found.append((got.token.tolist(), got.slots.tolist(), got.counts, got.extras, got.flags))
        assert group.counters.bytes_sent["local"] == 0
        return [found, group.counters.overflows, group.counters.collectives[-1, "dispatch"]]

    results = run_groups(act, [0] * size, short_messages=short)
    overflows = 0
    for turn, (wanted, rooms_RR, flags) in enumerate(turns):
        exceeds = [
            wanted[source][:, target].sum() > max(rooms_RR[source, target], 1)
            for source in range(size)
            for target in range(size)
        ]
        overflows += any(exceeds)
        expected_flags = int(np.bitwise_or.reduce(flags)) | (OVERFLOW if any(exceeds) else 0)
        for rank, (found, *_) in enumerate(results):
            rows = [(s, row) for s in range(size) for row in np.flatnonzero(wanted[s][:, rank]).tolist()]
            token, slots, counts, extras, told = found[turn]
            assert token == [100 * source + row for source, row in rows]
            assert slots == [slots_R[source][row].tolist() for source, row in rows]
            assert counts == [int(wanted[source][:, rank].sum()) for source in range(size)]
            assert extras == [0 if source == rank else 7 * source for source in range(size)]
            assert told == expected_flags
    assert all(extra == overflows and issued == len(turns) for _, extra, issued in results)


def test_memory_in_use_is_not_given_away() -> None:
    """An exchange that has not been finished holds it."""

    def act(group: RankGroup) -> None:
        exchange = RowExchange(group, make_moves(group.device), kind="dispatch")
        copies = TokenCopies(
            np.zeros(0, np.int64), np.zeros((0, 1), np.int64), {"weights": torch.zeros(0, 1), "x": torch.zeros(0, 2)}
        )
        none = Outgoing.of(np.zeros((0, 1), bool))
        exchange.start(copies.layout(), copies, none, capacity=Capacity([0], [0]))
        with pytest.raises(AssertionError, match="its memory is in use"):
            exchange.start(copies.layout(), copies, none, capacity=Capacity([0], [0]))

    run_groups(act, [0])
