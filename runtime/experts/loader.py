"""Loader: the thread that brings experts into fast memory, one at a time.

What is asked for goes before what is fetched ahead, and each in its order. What is fetched ahead gets its row when its
turn comes, not before, and is forgotten without a trace if it is cancelled by then.

An emulated link makes every load take at least as long as its bytes would: the thread sleeps, as one that waits for a
link does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

Copy = Callable[[int, int, int], None]
"""(layer, storage row, fast row): copies an expert's weights."""


@dataclass(eq=False)
class Load:
    """One expert on its way.

    Attributes:
        layer, row: the expert, by its storage row.
        target: fast row; None until the turn of what is fetched ahead comes.
        done: set when the weights are there.
        error: what went wrong, to be raised where the load is waited for.
        since: moment of the request.
    """

    layer: int
    row: int
    target: int | None = None
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Loader:
    """See the module.

    Attributes:
        lock: guards the queues and whatever `take_row` looks at.
        loads: finished so far.
        seconds: spent on them.
    """

    def __init__(
        self,
        copy: Copy,
        *,
        wanted: Callable[[Load], bool],
        take_row: Callable[[Load], int | None],
        least_seconds: Callable[[int], float],
    ) -> None:
        """Start the thread.

        Args:
            copy: see `Copy`.
            wanted: whether what is fetched ahead is still to be fetched, asked with `lock` held.
            take_row: a row for what is fetched ahead, with `lock` held; None = there is none now.
            least_seconds: of a load of an expert of a layer, on the emulated link.
        """
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._copy, self._wanted, self._take_row, self._least_seconds = copy, wanted, take_row, least_seconds
        self._asked: deque[Load] = deque()
        self._ahead: deque[Load] = deque()
        self._current: Load | None = None
        self._stopped = False
        self.loads, self.seconds = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="moeplace-loader", daemon=True)
        self._thread.start()

    def ask(self, load: Load) -> None:
        """Load as soon as possible; its row is known."""
        with self._changed:
            self._asked.append(load)
            self._changed.notify_all()

    def ask_ahead(self, load: Load) -> None:
        """Load when nothing is asked for, and when there is a row."""
        with self._changed:
            self._ahead.append(load)
            self._changed.notify_all()

    def waits(self, layer: int, row: int) -> bool:
        """Whether an expert waits to be fetched ahead."""
        with self.lock:
            return any(load.layer == layer and load.row == row for load in self._ahead)

    def cancel(self, layer: int | None = None) -> None:
        """Forget what waits to be fetched ahead for a layer, or all of it; what has begun goes on."""
        with self.lock:
            kept = [] if layer is None else [load for load in self._ahead if load.layer != layer]
            self._ahead = deque(kept)

    def retry(self) -> None:
        """Rows have become free: what waits for one may find it."""
        with self._changed:
            self._changed.notify_all()

    def drain(self) -> None:
        """Cancel what waits, and wait for the load under way."""
        self.cancel()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or (self._current is None and not self._asked))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # which may be the one that drops the last reference
            self._thread.join()

    def _next(self) -> Load | None:
        """What to load now; the lock is held."""
        if self._asked:
            return self._asked.popleft()
        while self._ahead:
            load = self._ahead[0]
            if not self._wanted(load):  # it has been asked for meanwhile
                self._ahead.popleft()
                continue
            load.target = self._take_row(load)
            return None if load.target is None else self._ahead.popleft()
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                while not self._stopped and (load := self._next()) is None:
                    self._changed.wait()
                if self._stopped or load is None:
                    return
                self._current = load
            self._carry_out(load)

    def _carry_out(self, load: Load) -> None:
        began = time.perf_counter()
        assert load.target is not None
        try:
            self._copy(load.layer, load.row, load.target)
            left = self._least_seconds(load.layer) - (time.perf_counter() - began)
            if left > 0:
                time.sleep(left)
        except BaseException as error:  # raised where the load is waited for, on the thread that computes
            load.error = error
        self.seconds += time.perf_counter() - began
        self.loads += 1
        load.done.set()
