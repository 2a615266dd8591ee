"""Every collective of a group: what it brings, under which name, layer and tier it is counted, how it fails."""

import threading
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import OUTSIDE
from moeplace.runtime.errors import PeerLostError
from tests.runtime.thread_ranks import WAIT, run_groups


def tier_bytes(nodes: list[int], rank: int, bytes_to_peer: list[int]) -> dict[str, int]:
    """Bytes by tier, zeros left out, reckoned pair by pair."""
    found: dict[str, int] = {}
    for peer, sent in enumerate(bytes_to_peer):
        tier = "local" if peer == rank else "intra_node" if nodes[peer] == nodes[rank] else "inter_node"
        found[tier] = found.get(tier, 0) + sent
    return {tier: sent for tier, sent in found.items() if sent}


def sent_by(group: RankGroup, act: Callable[[], None]) -> dict[str, int]:
    """Bytes by tier that a call adds."""
    before = dict(group.counters.bytes_sent)
    act()
    after = {tier: sent - before.get(tier, 0) for tier, sent in group.counters.bytes_sent.items()}
    return {tier: sent for tier, sent in after.items() if sent}


@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 1], [0, 0, 1, 1], [0, 1, 1]])
def test_collectives_bring_and_count_what_they_should(nodes: list[int]) -> None:
    """On any nodes: sums, copies and blocks as reckoned by hand, and the bytes of each pair of ranks in its tier."""
    size = len(nodes)

    def act(group: RankGroup) -> list[str]:
        rank, kinds = group.rank, []
        group.observer = kinds.append

        def is_counted(sent: dict[str, int], bytes_to_peer: list[int]) -> bool:
            return sent == tier_bytes(nodes, rank, bytes_to_peer)

        mine, everyone = torch.arange(6.0).view(2, 3) + 10 * rank, torch.empty(size, 2, 3)
        assert is_counted(sent_by(group, lambda: group.all_gather(everyone, mine, kind="gather")), [24] * size)
        assert torch.equal(everyone, torch.stack([torch.arange(6.0).view(2, 3) + 10 * r for r in range(size)]))
        blocks, block = torch.arange(2.0 * size).view(size, 2) + rank, torch.empty(2)
        assert is_counted(sent_by(group, lambda: group.reduce_scatter(block, blocks, kind="scatter")), [8] * size)
        assert block.tolist() == [size * (2.0 * rank + i) + sum(range(size)) for i in range(2)]
        total = torch.full((3,), rank, dtype=torch.int64)
        assert is_counted(sent_by(group, lambda: group.all_reduce(total, kind="sum")), [2 * 3 * 8 // size] * size)
        assert total.tolist() == [sum(range(size))] * 3
        word, root = torch.full((5,), rank, dtype=torch.int32), size - 1
        told = sent_by(group, lambda: group.broadcast(word, root=root, kind="word"))
        assert is_counted(told, [20 if rank == root else 0] * size)
        assert word.tolist() == [root] * 5
        # r + p rows from rank r to rank p, rows of two numbers of four bytes.
        counts = [rank + peer for peer in range(size)]
        rows = torch.cat([torch.full((rank + peer, 2), 10 * rank + peer, dtype=torch.int32) for peer in range(size)])
        got = torch.empty(sum(counts), 2, dtype=torch.int32)
        told = sent_by(group, lambda: group.all_to_all(got, rows, counts, counts, kind="rows"))
        assert is_counted(told, [8 * count for count in counts])
        assert got[:, 0].tolist() == [10 * peer + rank for peer in range(size) for _ in range(peer + rank)]
        assert group.counters.seconds["exchange"] > 0
        assert group.counters.collectives == {(OUTSIDE, kind): 1 for kind in kinds}
        assert not group.counters.collectives_of_mode
        return kinds

    assert run_groups(act, nodes) == [["gather", "scatter", "sum", "word", "rows"]] * size


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [5, 0, 1], [0, 3, 300]])
def test_bytes_of_any_length_reach_everybody(size: int, lengths: list[int]) -> None:
    """Nothing at all too; alone nothing is sent."""
    contents = [bytes(np.random.default_rng(rank).bytes(length)) for rank, length in enumerate(lengths)][:size]

    def act(group: RankGroup) -> None:
        assert group.all_gather_bytes(contents[group.rank], kind="all") == contents
        for root in range(size):
            assert group.broadcast_bytes(contents[group.rank], root=root, kind="one") == contents[root]
        assert bool(group.counters.collectives) == (size > 1)

    assert run_groups(act, [0] * size) == [None] * size


def test_a_message_may_be_shorter_than_its_room() -> None:
    """With gloo, unless it is told to do as NCCL does: what was not sent leaves the room alone."""

    def act(group: RankGroup) -> list[int]:
        assert group.short_messages
        got = torch.full((3, 1), -1, dtype=torch.int64)
        rooms, sizes = ([0, 3], [0, 1]) if group.rank == 0 else ([3, 0], [2, 0])
        group.all_to_all(got, torch.full((sum(sizes), 1), group.rank), rooms, sizes, kind="rows")
        return got.flatten().tolist()

    assert run_groups(act, [0, 0]) == [[1, 1, -1], [0, -1, -1]]
    for wanted in (None, True, False):
        found = run_groups(
            lambda group: (group.short_messages, group.background().short_messages), [0], short_messages=wanted
        )
        assert found == [(wanted is not False,) * 2]


@pytest.mark.parametrize("nodes", [[0, 0], [0, 0, 1, 1]])
def test_collectives_inside_a_layer_belong_to_it(nodes: list[int]) -> None:
    """Those of the node's group too; those of the background and those behind it to none, also after an error."""

    def act(group: RankGroup) -> None:
        group.open_all()
        value, counters = torch.ones(1), group.counters
        members = [group] if group.num_nodes == 1 else [group, group.node_group()]

        def fail_in(layer: int) -> None:
            with group.layer(layer, mode="coherent"):
                for member in (*members, group.background()):
                    member.all_reduce(value, kind=f"in {layer}")
                raise KeyError

        for layer in (3, 5):
            with pytest.raises(KeyError):
                fail_in(layer)
            assert counters.collectives[layer, f"in {layer}"] == len(members)
            assert counters.collectives[OUTSIDE, f"in {layer}"] == 1
        for member in members:
            member.all_reduce(value, kind="behind")
        assert counters.collectives[OUTSIDE, "behind"] == len(members)
        assert counters.collectives_of_mode == {"coherent": 2 * len(members)}
        assert counters.layer_passes == {"coherent": 2}

    assert run_groups(act, nodes) == [None] * len(nodes)


@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 1], [0, 0, 1]])
def test_what_is_opened_is_there(nodes: list[int]) -> None:
    """All groups that passes may ask for, and no others: nobody connects later, and `close` ends them all."""

    def act(group: RankGroup) -> None:
        group.open_all()
        several = len(set(nodes)) > 1
        assert (group._background is not None) == (len(nodes) > 1)
        assert (group._node_group is not None) == several
        for one in [] if len(nodes) == 1 else [group, group.background()]:
            assert (one._node_group is not None) == several
            if several:
                assert one.node_group() is one.node_group()
                assert one.node_group().size == nodes.count(nodes[group.rank])
        inside, closed = group._node_group, []
        assert group.with_nodes(np.array(nodes)) is group
        group._watch = type("Watch", (), {"close": lambda self: closed.append(1), "check": lambda self: None})()
        group.close()
        assert closed == [1]
        assert inside is None or not hasattr(inside, "_group")
        assert not hasattr(group, "_group")

    assert run_groups(act, nodes) == [None] * len(nodes)


@pytest.mark.parametrize("layer", [None, 4])
def test_a_lost_peer_is_named_with_what_was_being_done(layer: int | None) -> None:
    """Rank 1 goes; rank 0 hears of it in a collective, and in one that was on its way."""
    is_there = threading.Barrier(2)

    def act(group: RankGroup) -> list[str]:
        is_there.wait(WAIT)
        if group.rank == 1:
            group.close()
            return []
        told = []
        for _ in range(2):
            inside = nullcontext() if layer is None else group.layer(layer, mode="coherent")
            with inside, pytest.raises(PeerLostError) as caught:
                group.all_reduce(torch.ones(4), kind="sum")
            told.append(str(caught.value))
        return told

    place = "no MoE layer" if layer is None else f"MoE layer {layer}"
    for told in run_groups(act, [0, 0])[0]:
        assert told.startswith(f"rank 0 of 2 lost a peer during sum ({place}): ")
        assert told.endswith(f" (timeout {WAIT:g} s)")
        assert "\n" not in told


@pytest.mark.parametrize("late", [0, 1, 2])
def test_who_leaves_with_an_exchange_on_its_way_holds_up_nobody(late: int) -> None:
    """Nobody has died: rank 0 leaves while an exchange of the background is on its way, which a late one does not join
    because it waits for rank 0 in another collective. It hears that rank 0 is gone, and no timeout has to pass."""

    def act(group: RankGroup) -> str:
        group.open_all()
        group.all_gather_bytes(b"all are here", kind="meet")
        if group.rank != late:
            rows = torch.ones(3, 1)
            kept = group.background().start_all_to_all(torch.empty(3, 1), rows, [1] * 3, [1] * 3, kind="kv")
            del kept  # as who goes on without it does
        try:
            if group.rank:
                group.all_reduce(torch.ones(1), kind="sum")
        except PeerLostError as error:
            return str(error)
        finally:
            group.close()
        return ""

    told = run_groups(act, [0, 0, 0])
    assert told[0] == ""
    for sentence in told[1:]:
        assert "lost a peer during sum" in sentence
        assert "timed out" not in sentence.lower()


def test_a_node_map_of_other_ranks_is_refused() -> None:
    """Before anybody is waited for."""
    with pytest.raises(InputError, match="there are 2 ranks, but node_of_rank lists 3"):
        RankGroup(dist.HashStore(), rank=0, size=2, timeout=WAIT, node_of_rank=np.zeros(3, np.int64))
