"""Layers that do not depend on each other, searched on the nodes of a Ray cluster: one task per layer."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from moeplace.profiling.errors import MoeplaceError

TRIES = 2
"""Workers that a layer may lose, besides its first, before the solve ends."""


class RaySpread:
    """A `moeplace.placement.budget.Spread` over a cluster.

    Args:
        connect: gives the module, connected; called when there is something to spread.
        cpus: reserved for a layer.

    Attributes:
        tasks: how many were run.
    """

    def __init__(self, connect: Callable[[], Any], *, cpus: float = 1.0) -> None:
        self._connect, self._cpus, self.tasks = connect, cpus, 0
        self._ray: Any = None

    def __call__(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], report: Callable[[float], None]
    ) -> list[Any]:
        """[function(shared, item) for item in items], as many at once as the cluster has room for.

        What is shared travels once to each node.

        Raises:
            MoeplaceError: there is no cluster, an item failed, or its workers were lost.
        """
        ray = self._ray = self._ray or self._connect()
        task = ray.remote(num_cpus=self._cpus, max_retries=TRIES)(run_item)
        stored = ray.put(pickle.dumps((function, shared)))
        refs = [task.remote(stored, item) for item in items]
        self.tasks += len(refs)
        waiting = list(refs)
        try:
            while waiting:
                ended, waiting = ray.wait(waiting)
                ray.get(ended)  # one that failed ends the others
                report(1 - len(waiting) / len(refs))
            return list(ray.get(refs))
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1][:200]
            raise MoeplaceError(f"a layer could not be searched on the Ray cluster: {last}") from error
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)


def run_item(stored: bytes, item: Any) -> Any:
    """On a worker. Bytes of its own, because arrays that lie in Ray's store cannot be written to."""
    function, shared = pickle.loads(stored)  # from the driver of this job
    return function(shared, item)
