"""Ranks as threads of this process, each with a group of its own: tests of exchanges that need no process."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from moeplace.runtime.comm.group import RankGroup

WAIT = 60.0


def run_threads(act: Callable[[int], Any], size: int) -> list[Any]:
    """What `act(rank)` gives, of ranks side by side; the first error of any of them is raised."""
    found: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    return found


def run_groups(act: Callable[[RankGroup], Any], nodes: list[int], **options: Any) -> list[Any]:
    """What `act(group)` gives, of the ranks of a new group on these nodes; `options` of a `RankGroup`."""
    store, node_of_rank = dist.HashStore(), np.array(nodes)

    def run(rank: int) -> Any:
        group = RankGroup(store, rank=rank, size=len(nodes), timeout=WAIT, node_of_rank=node_of_rank, **options)
        try:
            return act(group)
        finally:
            group.close()

    return run_threads(run, len(nodes))
