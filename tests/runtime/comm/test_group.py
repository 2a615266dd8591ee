"""Process groups: derived ones, errors that are no lost peer, and an end without an abort."""

import gc
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplace.runtime.comm.backend import tells_of_lost_peer
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.errors import PeerLostError
from tests.rank_pool import RankContext, RankPool


def derive_twice(context: RankContext) -> list[float]:
    """Sums over the ranks in all groups that two engines would make of one base group."""
    base, sums = context.group(), []
    for _ in range(3):
        group = base.with_nodes(np.arange(context.size) // 2)
        for one in (group, group.node_group(), group.background()):
            value = torch.ones(1)
            one.all_reduce(value, kind="test")
            sums.append(float(value))
        group.agree({"round": str(len(sums))})
    return sums


def test_groups_may_be_derived_again(pool: RankPool) -> None:
    """The second and third of a kind on the same base group meet in stores of their own."""
    for sums in pool.run(derive_twice):
        assert sums == [4, 2, 4] * 3


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What nobody holds any more goes at once, or stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_closed_group_goes_with_its_last_owner(no_collector: None) -> None:
    """And its store, which may be a connection: a rank that is in many groups must not wait for the collector."""
    store = dist.HashStore()
    group = RankGroup(store, rank=0, size=1, timeout=5)
    node = group.with_nodes(np.zeros(1, np.int64)).node_group()
    kept = [weakref.ref(one) for one in (group, node, group.background(), store)]
    group.agree({"a": "1"})
    group.close()
    del group, node, store
    assert [one() for one in kept] == [None] * 4


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("The client socket has timed out after 2000ms"), True),
        (dist.DistStoreError("wait timeout after 2000ms, keys: /agree/1/1"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 2000ms for recv operation to complete"), True),
        (RuntimeError("Socket Timeout"), True),
        (RuntimeError("Connection reset by peer"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
            False,
        ),
        (RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:1] op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("Split sizes doesn't match total dim 0 size"), False),
        (RuntimeError("invalid tensor size at index 0"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("expected scalar type Float but found Half"), False),
    ],
)
def test_only_what_tells_of_a_lost_peer_is_called_one(error: RuntimeError, lost: bool) -> None:
    """Messages of gloo, of the stores, and of faults of this rank's own."""
    assert tells_of_lost_peer(error) == lost


def exchange_wrongly(context: RankContext) -> list[str]:
    """Types of the errors of collectives that this rank calls with tensors that do not fit."""
    group, found = context.group(), []
    cases = [
        lambda: group.all_to_all(
            torch.empty(2, 3), torch.empty(4, 3), [1] * context.size, [3] * context.size, kind="a"
        ),
        lambda: group.all_gather(torch.empty(context.size, 2), torch.empty(3), kind="b"),
        lambda: group.all_reduce(torch.empty(0, 2, device="meta"), kind="c"),
    ]
    for case in cases:
        try:
            case()
            found.append("no error")
        except Exception as error:
            found.append(type(error).__name__)
    return found


def test_a_defect_of_ours_is_no_lost_peer(pool: RankPool) -> None:
    """Shapes that do not fit, on all ranks alike: an error, but not PeerLostError."""
    for found in pool.run(exchange_wrongly, size=2):
        assert not set(found) & {"no error", PeerLostError.__name__}


SCRIPT = """
    import sys
    import torch.distributed as dist
    from moeplace.runtime.comm.group import RankGroup
    import numpy as np, torch
    rank, path = int(sys.argv[1]), sys.argv[2]
    group = RankGroup(dist.FileStore(path, 2), rank=rank, size=2, timeout=60)
    nodes = group.with_nodes(np.arange(2))
    for one in (group, nodes, nodes.background(), nodes.node_group()):
        one.all_reduce(torch.ones(1), kind="test")
    print("done", flush=True)
    kept = [group, nodes]  # alive until Python ends
"""


def test_processes_end_well_with_groups_that_nobody_closed(tmp_path: Path) -> None:
    """Exit code 0 and nothing on stderr, on both ranks, several times over."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for attempt in range(3):
        command = [sys.executable, str(script)]
        store = str(tmp_path / f"store{attempt}")
        ranks = [
            subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        ends = [(process.communicate(timeout=100), process.returncode) for process in ranks]
        assert ends == [(("done\n", ""), 0)] * 2


def test_a_closed_group_is_not_closed_again() -> None:
    """By hand, then at the end: no error."""
    group = RankGroup(dist.HashStore(), rank=0, size=1, timeout=5)
    group.background()
    group.close()
    group.close()
