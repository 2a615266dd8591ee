"""Items that do not depend on each other, such as layers or recordings, on the nodes of a Ray cluster: a task each."""

import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moeplace.profiling.errors import MoeplaceError, MoeplaceWarning

TRIES = 2
"""Workers that an item may lose, besides its first, before everything ends."""

END_SECONDS = 60.0
"""How long tasks that nobody waits for are asked to end."""

AGAIN_SECONDS = 0.1
"""Between two times that they are asked."""


class RaySpread:
    """A `moeplace.placement.budget.Spread` over a cluster.

    Args:
        connect: gives the module, connected; called when there is something to spread.
        cpus: reserved for an item.
        what: an item, for messages.

    Attributes:
        tasks: how many were run.
    """

    def __init__(self, connect: Callable[[], Any], *, cpus: float = 1.0, what: str = "layer") -> None:
        self._connect, self._cpus, self._what, self.tasks = connect, cpus, what, 0
        self._ray: Any = None

    def __call__(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], report: Callable[[float], None]
    ) -> list[Any]:
        """[function(shared, item) for item in items], as many at once as the cluster has room for.

        Raises:
            MoeplaceError: see `each`.
        """
        found: dict[int, Any] = {}
        for index, answer in self.each(function, shared, items):
            found[index] = answer
            report(len(found) / len(items))
        return [found[index] for index in range(len(items))]

    def each(self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(index, function(shared, item)) of every item, as they are done; nothing is kept that was given.

        What is shared travels once to each node. When the caller takes no more, the rest is ended.

        Raises:
            MoeplaceError: there is no cluster, an item failed, or its workers were lost. What the function itself
                raises of these comes as it is.
        """
        ray = self._ray = self._ray or self._connect()
        task = ray.remote(num_cpus=self._cpus, max_retries=TRIES)(run_item)
        stored = ray.put(pickle.dumps((function, shared)))
        index_of = {task.remote(stored, item): index for index, item in enumerate(items)}
        self.tasks += len(index_of)
        try:
            while index_of:
                ended, _ = ray.wait(list(index_of))
                answer = ray.get(ended[0])
                index = index_of.pop(ended[0])
                if isinstance(answer, _Refusal):
                    raise answer.error
                yield index, answer
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1][:200]
            raise MoeplaceError(f"a {self._what} failed on the Ray cluster: {last}") from error
        finally:
            end_tasks(ray, list(index_of), self._what)


def end_tasks(ray: Any, left: list[Any], what: str) -> None:
    """Cancel tasks until none is left: one that is on its way to a worker while it is cancelled may run all the same.

    That was so for one in seven (Ray 2.60), which then kept their CPUs for as long as the cluster was up.
    """
    deadline = time.monotonic() + END_SECONDS
    try:
        while left and time.monotonic() < deadline:
            for ref in left:
                ray.cancel(ref, force=True)
            _, left = ray.wait(left, num_returns=len(left), timeout=AGAIN_SECONDS, fetch_local=False)
    except ray.exceptions.RayError:  # the cluster is gone, and with it the tasks
        return
    if left:
        warnings.warn(
            f"{len(left)} of the {what}s could not be ended on the Ray cluster", MoeplaceWarning, stacklevel=3
        )


@dataclass(frozen=True)
class _Refusal:
    """What a user can mend, on its way here."""

    error: MoeplaceError


def run_item(stored: bytes, item: Any) -> Any:
    """On a worker. Bytes of its own, because arrays that lie in Ray's store cannot be written to."""
    function, shared = pickle.loads(stored)  # from the driver of this job
    try:
        return function(shared, item)
    except MoeplaceError as error:
        return _Refusal(error)
