"""Scheduler: continuous batching over the rows of a K/V cache.

Every rank runs the same scheduler on the same requests, so that all know which sequences a step serves and where.

A pass has a budget of tokens. Every sequence that goes on takes one of them; what is left goes to prompts, first come
first served, in chunks where a prompt does not fit. So neither side waits for the other: a sequence gets a token in
every pass, however long the prompts are that arrive, and prompts proceed by a token at least, however many sequences
there are.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request, RunningSequence


class Scheduler:
    """Which sequences run, where they live, and who waits.

    Attributes:
        waiting: requests without a place, first come first served.
        running: sequences with a place, in the order of admission.
        replicated: whether a sequence takes its row of the K/V cache on all ranks.
        kept_free: rows that `next_batch` leaves for a check of the ranks.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        rows: int,
        positions: int,
        replicated: bool,
        max_prefill_tokens: int,
        cuts_prompts: bool = True,
    ) -> None:
        """`rows` cache rows of `positions` on every rank; with `replicated` a sequence takes its row on all ranks.

        Args:
            max_prefill_tokens: the budget of a pass that serves prompts.
            cuts_prompts: whether a prompt may run in chunks. If not, one that exceeds the budget exceeds it.
        """
        self.num_ranks, self.rows, self.positions, self.replicated = num_ranks, rows, positions, replicated
        self.max_prefill_tokens, self._cuts_prompts = max_prefill_tokens, cuts_prompts
        self.waiting: deque[Request] = deque()
        # Of waiting requests that ran before:
        self._added: dict[str, tuple[int, ...]] = {}
        self._logprobs: dict[str, dict[int, TokenLogprob]] = {}
        self.running: list[RunningSequence] = []
        pools = 1 if replicated else num_ranks
        self._free = [list(range(rows)) for _ in range(pools)]
        self.kept_free = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def kv_used(self) -> int:
        """Positions of running sequences whose K/V exist."""
        return sum(sequence.cached for sequence in self.running)

    @property
    def kv_room(self) -> int:
        """Positions that sequences can take on all ranks together."""
        return len(self._free) * self.rows * self.positions

    def add(self, request: Request) -> None:
        """Queue a request; raises as `check`."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Whether a request can be queued.

        Raises:
            InputError: it can never fit, or its name is in use.
        """
        request.require_fit(positions=self.positions)
        taken = {r.request_id for r in self.waiting} | {s.request.request_id for s in self.running}
        if request.request_id in taken:
            raise InputError(f"request {request.request_id!r} is already in flight; names must be unique")

    def resume(
        self, request: Request, added: Sequence[int], logprobs: Mapping[int, TokenLogprob] | None = None
    ) -> None:
        """Queue, behind the others, a request that has got tokens already."""
        self.waiting.append(request)
        self._added[request.request_id] = tuple(added)
        self._logprobs[request.request_id] = dict(logprobs or {})

    def added(self, request: Request) -> tuple[int, ...]:
        """Tokens that a waiting request has got already."""
        return self._added.get(request.request_id, ())

    def logprobs(self, request: Request) -> dict[int, TokenLogprob]:
        """Log-probabilities of `added`, by index."""
        return self._logprobs.get(request.request_id, {})

    def seat(self, sequence: RunningSequence) -> None:
        """Take over a sequence that has a home and a row, which must be free."""
        pool = self._pool(sequence.home)
        pool.remove(sequence.row)
        heapq.heapify(pool)
        self.running.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request, wherever it is; an unknown one is ignored."""
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        self._forget(request_id)
        for sequence in [s for s in self.running if s.request.request_id == request_id]:
            self.release(sequence)

    def next_batch(self) -> Batch:
        """What the next pass runs; waiting requests that take part get a place. Empty = there is nothing to do."""
        ready, behind, lengths = self._plan()
        prompts = [*behind, *(self._admit() for _ in lengths[len(behind) :])][: len(lengths)]
        return Batch.of([*ready, *prompts], [1] * len(ready) + lengths, has_prompts=bool(prompts))

    def prompts_of_next_pass(self) -> list[str]:
        """Requests that run more than their last token in the next pass."""
        _, behind, lengths = self._plan()
        known = [*(sequence.request for sequence in behind), *islice(self.waiting, self._num_free())]
        return [request.request_id for request in known[: len(lengths)]]

    def _plan(self) -> tuple[list[RunningSequence], list[RunningSequence], list[int]]:
        """Sequences that run their last token; those that are behind; and what prompts run, these and then new ones."""
        ready: list[RunningSequence] = []
        behind: list[RunningSequence] = []
        for sequence in self.running:
            is_ready = sequence.cached > 0 and (sequence.num_missing == 1 or not self._cuts_prompts)
            (ready if is_ready else behind).append(sequence)
        arriving = islice(self.waiting, self._num_free())
        missing = chain(
            (sequence.num_missing for sequence in behind),
            (len(request.token_ids) + len(self.added(request)) for request in arriving),
        )
        return ready, behind, self.share_out(missing, beside=len(ready))

    def share_out(self, missing: Iterable[int], *, beside: int = 0) -> list[int]:
        """Of the budget, less what runs `beside`, how many tokens each prompt gets, one after the other.

        Those that get none are left out.
        """
        room = max(self.max_prefill_tokens - beside, 1)
        lengths: list[int] = []
        for tokens in missing:
            if room <= 0 or (lengths and tokens > room and not self._cuts_prompts):
                break
            lengths.append(min(tokens, room) if self._cuts_prompts else tokens)
            room -= lengths[-1]
        return lengths

    def _num_free(self) -> int:
        """Rows for waiting requests."""
        return max(sum(map(len, self._free)) - self.kept_free, 0)

    def _admit(self) -> RunningSequence:
        """Give the request that has waited longest a place; a row is free."""
        sequence = self.place(self.waiting[0])
        assert sequence is not None
        self._forget(self.waiting.popleft().request_id)
        return sequence

    def place(self, request: Request) -> RunningSequence | None:
        """A sequence at the home with the fewest sequences (the lowest of equals); None = no row is free."""
        load = [0] * self.num_ranks
        for sequence in self.running:
            load[sequence.home] += 1
        homes = [home for home in range(self.num_ranks) if self._pool(home)]
        if not homes:
            return None
        home = min(homes, key=load.__getitem__)
        known = [*request.token_ids, *self.added(request)]
        sequence = RunningSequence(request, home, heapq.heappop(self._pool(home)), known)
        sequence.logprobs.update(self.logprobs(request))
        self.running.append(sequence)
        return sequence

    def release(self, sequence: RunningSequence) -> None:
        """Take a sequence's place back."""
        self.running.remove(sequence)
        heapq.heappush(self._pool(sequence.home), sequence.row)

    def _forget(self, request_id: str) -> None:
        """What a request had got before; it does not wait any more."""
        self._added.pop(request_id, None)
        self._logprobs.pop(request_id, None)

    def _pool(self, home: int) -> list[int]:
        return self._free[0 if len(self._free) == 1 else home]
