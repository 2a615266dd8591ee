"""Loader: the thread that brings experts into fast memory, one at a time.

What is asked for goes before what is fetched ahead, and each in its order. What is fetched ahead gets its row when its
turn comes, not before, and is forgotten without a trace if it is cancelled by then. It is loaded in pieces: between two
of them it is broken off if nobody wants it any more, and waits while something is asked for.

An emulated link makes every load take at least as long as its bytes would: the thread sleeps, as one that waits for a
link does.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

Copy = Callable[[int, int, int, int], Iterator[float]]
"""(layer, storage row, fast row, pieces): copies an expert's weights, a piece per turn; the share that is there."""


@dataclass(eq=False)
class Load:
    """One expert on its way.

    Attributes:
        layer, row: the expert, by its storage row.
        target: fast row; None until the turn of what is fetched ahead comes.
        done: set when the weights are there.
        began: moment at which it began, None = it has not; pauses are not taken out.
        error: what went wrong, to be raised where the load is waited for.
        is_ahead: nobody has asked for it yet.
        is_dropped: nobody will; its row may have been given to another load, which comes behind it.
    """

    layer: int
    row: int
    target: int | None = None
    done: threading.Event = field(default_factory=threading.Event)
    began: float | None = None
    error: BaseException | None = None
    is_ahead: bool = False
    is_dropped: bool = False


class Loader:
    """See the module.

    Attributes:
        lock: guards the queues and whatever `take_row` looks at.
        loads: finished so far.
        bytes: of them.
        broken, broken_bytes: shares of loads that were broken off, and their bytes.
        seconds: spent on finished loads.
    """

    def __init__(
        self,
        copy: Copy,
        *,
        wanted: Callable[[Load], bool],
        take_row: Callable[[Load], int | None],
        size: Callable[[Load], int],
        least_seconds: Callable[[int], float],
        pieces: int = 1,
    ) -> None:
        """Start the thread.

        Args:
            copy: see `Copy`.
            wanted: whether what is fetched ahead is still to be fetched, asked with `lock` held.
            take_row: a row for what is fetched ahead, with `lock` held; None = there is none now.
            size: bytes of an expert.
            least_seconds: of a load of so many bytes, on the emulated link.
            pieces: of a load that is fetched ahead.
        """
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._called = threading.Event()  # something is asked for, or was dropped
        self._copy, self._wanted, self._take_row = copy, wanted, take_row
        self._size, self._least_seconds = size, least_seconds
        self._pieces = pieces
        self._asked: deque[Load] = deque()
        self._ahead: deque[Load] = deque()
        self._current: Load | None = None
        self._stopped = False
        self.loads, self.bytes, self.seconds = 0, 0, 0.0
        self.broken, self.broken_bytes = 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="moeplace-loader", daemon=True)
        self._thread.start()

    def ask(self, load: Load) -> None:
        """Load as soon as possible; its row is known."""
        with self._changed:
            self._asked.append(load)
            self._changed.notify_all()
        self._called.set()

    def ask_ahead(self, load: Load) -> None:
        """Load when nothing is asked for, and when there is a row."""
        load.is_ahead = True
        with self._changed:
            self._ahead.append(load)
            self._changed.notify_all()

    def cancel(self, layer: int | None = None) -> None:
        """Forget what waits to be fetched ahead for a layer, or all of it; what has begun goes on."""
        with self.lock:
            kept = [] if layer is None else [load for load in self._ahead if load.layer != layer]
            self._ahead = deque(kept)

    def drop(self, loads: Iterable[Load]) -> None:
        """Break off what was fetched ahead in vain, if it is under way; its row is free."""
        for load in loads:
            load.is_dropped = True
            self._called.set()

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
        assert load.target is not None
        size = self._size(load)
        load.began = time.perf_counter()
        course = _Course(load, load.began, self._pieces if load.is_ahead else 1, self._least_seconds(size), size)
        try:
            for share in self._copy(load.layer, load.row, load.target, course.pieces):
                if share < 1 and not self._goes_on(course, share):
                    return
            if not self._follow_link(course):
                return
        except BaseException as error:  # raised where the load is waited for, on the thread that computes
            load.error = error
        self.seconds += time.perf_counter() - course.began
        self.loads += 1
        self.bytes += size
        load.done.set()

    def _goes_on(self, course: "_Course", share: float) -> bool:
        """Between two pieces: whether the rest is to be loaded; what is asked for passes first."""
        if course.load.is_dropped:
            self.broken += share
            self.broken_bytes += share * course.size
            course.load.done.set()
            return False
        began = time.perf_counter()
        while True:
            with self.lock:
                if not self._asked:
                    break
                asked = self._asked.popleft()
            self._carry_out(asked)
        course.began += time.perf_counter() - began
        return True

    def _follow_link(self, course: "_Course") -> bool:
        """Sleep as long as the emulated link takes; False = the load was broken off."""
        while (left := course.end - time.perf_counter()) > 0:
            if not course.load.is_ahead:
                time.sleep(left)
                continue
            self._called.clear()
            if not (course.load.is_dropped or self._asked):
                self._called.wait(left)
                continue
            share, moment = course.next_break(time.perf_counter())
            time.sleep(max(moment - time.perf_counter(), 0.0))
            if share < 1 and not self._goes_on(course, share):
                return False
        return True


@dataclass
class _Course:
    """A load on the emulated link.

    Attributes:
        load: the load.
        began: moment at which it began, pauses taken out.
        pieces: in which it is loaded.
        least: seconds that it takes.
        size: its bytes.
    """

    load: Load
    began: float
    pieces: int
    least: float
    size: int

    @property
    def end(self) -> float:
        return self.began + self.least

    def next_break(self, now: float) -> tuple[float, float]:
        """The end of the piece under way: as a share of the load, and its moment."""
        share = min(math.ceil((now - self.began) / self.least * self.pieces), self.pieces) / self.pieces
        return share, self.began + share * self.least
