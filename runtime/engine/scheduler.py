"""Scheduler: continuous batching over the rows of a K/V cache.

Every rank runs the same scheduler on the same requests, so that all know which sequences a step serves and where.

A pass has a budget of tokens. Every sequence that goes on takes one of them; what is left goes to prompts, first come
first served, in chunks where a prompt does not fit. So neither side waits for the other: a sequence gets a token in
every pass, however long the prompts are that arrive, and prompts proceed by a token at least, however many sequences
there are.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.kv.row_pool import Holding, Prefix, RowPool


class Scheduler:
    """Which sequences run, where they live, and who waits.

    Attributes:
        waiting: requests without a place, first come first served.
        running: sequences with a place, in the order of admission.
        replicated: whether a sequence takes its row of the K/V cache on all ranks.
        kept_free: rows that batches leave for a check of the ranks.
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
        reuses_prefixes: bool = False,
    ) -> None:
        """`rows` cache rows of `positions` on every rank; with `replicated` a sequence takes its row on all ranks.

        Args:
            max_prefill_tokens: the budget of a pass that serves prompts.
            cuts_prompts: whether a prompt may run in chunks. If not, one that exceeds the budget exceeds it.
            reuses_prefixes: whether a prompt takes over the K/V of another one that begins with the same tokens.
        """
        self.num_ranks, self.rows, self.positions, self.replicated = num_ranks, rows, positions, replicated
        self.max_prefill_tokens, self._cuts_prompts = max_prefill_tokens, cuts_prompts
        self._reuses_prefixes = reuses_prefixes
        self.waiting: deque[Request] = deque()
        # Of waiting requests that ran before:
        self._added: dict[str, tuple[int, ...]] = {}
        self._logprobs: dict[str, dict[int, TokenLogprob]] = {}
        self.running: list[RunningSequence] = []
        pools = 1 if replicated else num_ranks
        self._pools = [RowPool(rows) for _ in range(pools)]
        self._foreseen: Batch | None = None
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
        return len(self._pools) * self.rows * self.positions

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
        self._pool(sequence.home).take(sequence.row)
        self.running.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request, wherever it is; an unknown one is ignored."""
        self.waiting = deque(request for request in self.waiting if request.request_id != request_id)
        self._forget(request_id)
        for sequence in [s for s in self.running if s.request.request_id == request_id]:
            self.release(sequence)

    def next_batch(self) -> Batch:
        """What the next pass runs; waiting requests that take part get a place. Empty = there is nothing to do."""
        batch, self._foreseen = self.foresee(), None
        return batch

    def foresee(self) -> Batch:
        """What `next_batch` is going to give, unless a sequence goes before."""
        if self._foreseen is None:
            self._foreseen = self._plan()
        return self._foreseen

    def share_out(self, missing: Iterable[int]) -> list[int]:
        """Of the budget, how many tokens each prompt gets, one after the other; those that get none are left out."""
        lengths: list[int] = []
        for tokens in missing:
            length = self._chunk(tokens, self.max_prefill_tokens - sum(lengths), is_first=not lengths)
            if not length:
                break
            lengths.append(length)
        return lengths

    def _plan(self) -> Batch:
        ready: list[RunningSequence] = []
        behind: deque[RunningSequence] = deque()
        for sequence in self.running:
            is_ready = sequence.start > 0 and (sequence.num_missing == 1 or not self._cuts_prompts)
            (ready if is_ready else behind).append(sequence)
        prompts: list[RunningSequence] = []
        lengths: list[int] = []
        room = max(self.max_prefill_tokens - len(ready), 1)
        while room > 0:
            prompt = behind.popleft() if behind else self._admit(room, is_first=not prompts)
            if prompt is None:
                break
            prompts.append(prompt)
            lengths.append(self._chunk(prompt.num_missing, room, is_first=True))
            room -= lengths[-1]
        return Batch.of([*ready, *prompts], [1] * len(ready) + lengths, has_prompts=bool(prompts))

    def _chunk(self, missing: int, room: int, *, is_first: bool) -> int:
        """How many tokens a prompt that lacks `missing` gets of `room`; 0 = it has to wait."""
        if self._cuts_prompts:
            return min(missing, room)
        return missing if is_first or missing <= room else 0

    def _admit(self, room: int, *, is_first: bool) -> RunningSequence | None:
        """Give the request that has waited longest a place, if there is one and it gets a token of `room`."""
        if not self.waiting or sum(map(len, self._pools)) <= self.kept_free:
            return None
        request = self.waiting[0]
        if not self._chunk(len(request.token_ids) + len(self.added(request)), room, is_first=is_first):
            return None
        sequence = self.place(request, reuse=self._reuses_prefixes)
        assert sequence is not None
        self._forget(self.waiting.popleft().request_id)
        return sequence

    def place(self, request: Request, *, reuse: bool = False) -> RunningSequence | None:
        """A sequence at the home with the fewest sequences (the lowest of equals); None = no row is free.

        Args:
            reuse: let it begin with what a row holds of its tokens: at the home where that is most, of those which
                have at most one sequence more than another.
        """
        load = [0] * self.num_ranks
        for sequence in self.running:
            load[sequence.home] += 1
        homes = [home for home in range(self.num_ranks) if len(self._pool(home))]
        if not homes:
            return None
        least = min(load[home] for home in homes)
        known = [*request.token_ids, *self.added(request)]
        prefixes = {home: self._find_prefix(known, home) for home in homes if reuse and load[home] <= least + 1}

        def order(home: int) -> tuple[int, int]:
            prefix = prefixes.get(home)
            return (-prefix.positions if prefix else 0), load[home]

        home = min(homes, key=order)
        prefix, pool = prefixes.get(home), self._pool(home)
        row = pool.take(prefix.row if prefix and pool.is_free(prefix.row) else None)
        sequence = RunningSequence(request, home, row, known, prefix=prefix)
        sequence.logprobs.update(self.logprobs(request))
        self.running.append(sequence)
        return sequence

    def release(self, sequence: RunningSequence, *, keep: bool = True) -> None:
        """Take a sequence's place back; `keep`: its K/V are good for others."""
        self._foreseen = None
        self.running.remove(sequence)
        pool = self._pool(sequence.home)
        for other in self.running:
            if other.prefix is not None and other.prefix.row == sequence.row and self._pool(other.home) is pool:
                other.prefix = None  # it was about to copy what may be overwritten now
        held = sequence.token_ids[: self._usable(sequence)] if keep and self._reuses_prefixes else ()
        pool.give_back(sequence.row, held)

    def _find_prefix(self, token_ids: Sequence[int], home: int) -> Prefix | None:
        """What a row at a home holds of the beginning of a prompt."""
        pool = self._pool(home)
        mates = (sequence for sequence in self.running if self._pool(sequence.home) is pool)
        return pool.find(token_ids, (Holding(s.row, s.token_ids, self._usable(s)) for s in mates))

    def _usable(self, sequence: RunningSequence) -> int:
        """Positions of a sequence whose K/V are wherever one of another home, or of the same one, may want them."""
        return sequence.replicated if self.replicated else sequence.cached

    def _forget(self, request_id: str) -> None:
        """What a request had got before; it does not wait any more."""
        self._added.pop(request_id, None)
        self._logprobs.pop(request_id, None)

    def _pool(self, home: int) -> RowPool:
        return self._pools[0 if len(self._pools) == 1 else home]
