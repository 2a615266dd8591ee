"""RankPool: persistent processes that run test bodies as ranks of gloo (or NCCL) process groups.

`pool.run(body, *args, size=3)` calls the module-level function `body(context, *args)` on the first three workers, each
with its rank, and returns their results in order. There is no port: workers meet in a `FileStore`. Timeouts nest:
process group < run < test. A failure or a timeout ends the workers; the next run starts fresh ones.

Workers are forks of one process that has imported what bodies need and has no other thread ("forkserver"): torch and
transformers are imported once, not once for each of them.
"""

import faulthandler
import itertools
import multiprocessing as mp
import queue
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.runtime.comm.group import RankGroup

GROUP_TIMEOUT = 45.0  # on a loaded machine one rank may import torch and transformers that much later than another
RUN_TIMEOUT = 100.0
START_TIMEOUT = 100.0
IMPORTED = ["torch", "torch.distributed", "transformers", "moeplace.runtime.engine.engine", "tests.rank_pool"]


@dataclass(frozen=True)
class RankContext:
    """What a body knows of itself.

    Attributes:
        rank: its rank.
        size: ranks that run it.
        store: a store of these ranks alone, new for every run.
        timeout: seconds for its process groups.
    """

    rank: int
    size: int
    store: Any
    timeout: float
    _groups: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def group(self, node_of_rank: np.ndarray | None = None, **options: Any) -> RankGroup:
        """The process group of these ranks; `options` of a `RankGroup`.

        It waits until all are connected: a rank whose body fails at once would otherwise close its sockets while
        others still connect, and they would see a lost peer before the body begins.
        """
        places = {"rank": self.rank, "size": self.size, "node_of_rank": node_of_rank}
        group = RankGroup(self.store, timeout=self.timeout, **places, **options)
        made = next(self._groups)
        self.store.set(f"connected/{made}/{self.rank}", "")
        limit = timedelta(seconds=self.timeout)
        self.store.wait([f"connected/{made}/{rank}" for rank in range(self.size)], limit)
        return group


class RankPool:
    """Workers that live as long as nothing fails.

    Attributes:
        last_results: results of the last run by rank, None for ranks that failed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self._folder = tempfile.TemporaryDirectory(prefix="moeplace-ranks-")
        self._workers: list[Any] = []
        self._tasks: list[Any] = []
        self._results: Any = None
        self._runs = 0
        self.last_results: list[Any] = []

    def run(
        self, body: Callable[..., Any], *args: Any, size: int | None = None, timeout: float = RUN_TIMEOUT
    ) -> list[Any]:
        """Results of `body(context, *args)` by rank.

        Raises:
            AssertionError: a rank failed (its traceback is the message) or did not finish in time.
        """
        size = self.size if size is None else size
        if not self._workers:
            self._start()
        self._runs += 1
        store = str(Path(self._folder.name) / f"store-{self._runs}")
        for rank in range(size):
            self._tasks[rank].put((self._runs, body, args, rank, size, store))
        return self._collect(size, time.monotonic() + timeout)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def _start(self) -> None:
        self._results = self._context.Queue()
        self._tasks = [self._context.Queue() for _ in range(self.size)]
        self._workers = [
            self._context.Process(target=_work, args=(tasks, self._results), daemon=True) for tasks in self._tasks
        ]
        for worker in self._workers:
            worker.start()
        deadline = time.monotonic() + START_TIMEOUT
        try:
            for _ in self._workers:
                self._results.get(timeout=max(deadline - time.monotonic(), 0.1))
        except queue.Empty:
            self.close()
            raise AssertionError(f"the {self.size} ranks did not start within {START_TIMEOUT:g} s") from None

    def _collect(self, size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < size:
            try:
                run, rank, result, trace = self._results.get(timeout=0.2)
            except queue.Empty:
                missing = sorted(set(range(size)) - set(results) - set(failures))
                failures.update({rank: "died" for rank in missing if not self._workers[rank].is_alive()})
                if failures:  # the others get the time that their process group takes to notice
                    deadline = min(deadline, time.monotonic() + GROUP_TIMEOUT + 5)
                if time.monotonic() > deadline:
                    failures.update({rank: "did not finish" for rank in missing if rank not in failures})
                continue
            if run != self._runs:
                continue
            if trace is None:
                results[rank] = result
            else:
                failures[rank] = trace
        self.last_results = [results.get(rank) for rank in range(size)]
        if failures:
            self.close()
            raise AssertionError("\n".join(f"rank {rank}: {trace}" for rank, trace in sorted(failures.items())))
        return [results[rank] for rank in range(size)]


def _work(tasks: Any, results: Any) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable(sys.stderr)
    for announced in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):  # as pytest does in the parent
        warnings.simplefilter("error", announced)
    torch.set_num_threads(1)
    results.put((0, -1, None, None))
    while True:
        run, body, args, rank, size, path = tasks.get()
        try:
            context = RankContext(rank, size, dist.FileStore(path, size), GROUP_TIMEOUT)
            results.put((run, rank, body(context, *args), None))
        except BaseException:
            results.put((run, rank, None, traceback.format_exc()))
