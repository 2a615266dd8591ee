"""Scheduler: continuous batching over the rows of a K/V cache.

Every rank runs the same scheduler on the same requests, so that all know which sequences a step serves and where.
Places go to requests as they come, unless some may overtake others (`AlikeOrder`).

A pass has a budget of tokens. Every sequence that goes on takes one of them; what is left goes to prompts, first come
first served, in chunks where a prompt does not fit. So neither side waits for the other: a sequence gets a token in
every pass, however long the prompts are that arrive, and prompts proceed by a token at least, however many sequences
there are.

Where memory is claimed by the page, a sequence that finds none takes it from the youngest one, which waits again, first
of all, and is made again from its tokens. So the oldest one always goes on, and all end.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.admission.alike import AlikeOrder
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.kv.row_pool import LEAST_PREFIX, PAGE, Holding, Prefix, RowPool


class Scheduler:
    """Which sequences run, where they live, and who waits.

    Attributes:
        waiting: requests without a place, in the order in which they came.
        order: which of them goes next.
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
        pages: int | None = None,
        spare_rows: int = 0,
        most_overtaken: int = 0,
    ) -> None:
        """`rows` cache rows of `positions` on every rank; with `replicated` a sequence takes its row on all ranks.

        Args:
            max_prefill_tokens: the budget of a pass that serves prompts.
            cuts_prompts: whether a prompt may run in chunks. If not, one that exceeds the budget exceeds it.
            reuses_prefixes: whether a prompt takes over the K/V of another one that begins with the same tokens.
            pages: of memory on every rank, enough for a sequence of all positions; None = enough for all rows.
            spare_rows: of `rows`, how many are for what sequences leave behind, not for sequences.
            most_overtaken: how many later requests may go before one that waits; see `AlikeOrder`.
        """
        self.num_ranks, self.rows, self.positions, self.replicated = num_ranks, rows, positions, replicated
        self.max_prefill_tokens, self._cuts_prompts = max_prefill_tokens, cuts_prompts
        self._reuses_prefixes = reuses_prefixes
        self.waiting: deque[Request] = deque()
        self.order = AlikeOrder(most_overtaken)
        # Of waiting requests that ran before:
        self._added: dict[str, tuple[int, ...]] = {}
        self._logprobs: dict[str, dict[int, TokenLogprob]] = {}
        self.running: list[RunningSequence] = []
        pools = 1 if replicated else num_ranks
        self._pools = [RowPool(rows, pages=pages, spare=spare_rows) for _ in range(pools)]
        self._room = (rows - spare_rows) * positions  # of each
        if pages is not None:
            self._room = min(self._room, pages * PAGE)
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
        return len(self._pools) * self._room

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
        self,
        request: Request,
        added: Sequence[int],
        logprobs: Mapping[int, TokenLogprob] | None = None,
        *,
        overtaken: int = 0,
    ) -> None:
        """Queue, behind the others, a request that has got tokens already, or has been overtaken."""
        self.waiting.append(request)
        self.order.restore(request.request_id, overtaken)
        self._added[request.request_id] = tuple(added)
        self._logprobs[request.request_id] = dict(logprobs or {})

    def added(self, request: Request) -> tuple[int, ...]:
        """Tokens that a waiting request has got already."""
        return self._added.get(request.request_id, ())

    def logprobs(self, request: Request) -> dict[int, TokenLogprob]:
        """Log-probabilities of `added`, by index."""
        return self._logprobs.get(request.request_id, {})

    def unforeseen(self) -> list[Request]:
        """Requests whose forecast is needed before places are given away; see `AlikeOrder.learn`."""
        if not self.order.most_overtaken:
            return []
        running = [sequence.request for sequence in self.running]
        names, running_names = ([request.request_id for request in some] for some in (self.waiting, running))
        wanted = set(self.order.unforeseen(names, running_names, places=sum(map(len, self._pools))))
        return [request for request in (*running, *self.waiting) if request.request_id in wanted] if wanted else []

    def seat(self, sequence: RunningSequence) -> None:
        """Take over a sequence that has a home and a row, which must be free."""
        self._pool(sequence.home).seat(sequence.row, sequence.cached)
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
        if not batch.sequences:
            return batch
        trims = [(home, trim) for home, pool in enumerate(self._pools) for trim in pool.take_trims()]
        return replace(batch, trims=tuple(trims)) if trims else batch

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
        sequences: list[RunningSequence] = []
        lengths: list[int] = []
        leaders: list[RunningSequence] = []
        room = max(self.max_prefill_tokens - sum(map(self._is_ready, self.running)), 1)
        self._lend_rows()
        has_prompts, num_waiting, before = False, 0, list(self.running)
        for sequence in before:  # the oldest first: they may take memory from those that follow
            if len(self.running) < len(before) and sequence not in self.running:
                continue
            if self._is_ready(sequence):
                length = int(self._grow(sequence, sequence.start + 1))
            elif self._awaits(sequence, leaders):
                num_waiting += 1
                continue
            else:
                chunk = self._chunk(sequence.num_missing, room, is_first=not has_prompts)
                length = self._grow_by(sequence, chunk)
                room, has_prompts = room - length, has_prompts or length > 0
            if length:
                sequences.append(sequence)
                lengths.append(length)
                leaders += [sequence] if self._will_give(sequence) else []
        goes_on = len(sequences) + num_waiting == len(before)  # else there is no memory for more
        while goes_on and room > 0 and (prompt := self._admit(room, is_first=not has_prompts)) is not None:
            if self._awaits(prompt, leaders):
                continue
            sequences.append(prompt)
            lengths.append(self._grow_by(prompt, self._chunk(prompt.num_missing, room, is_first=True)))
            room, has_prompts = room - lengths[-1], True
            leaders.append(prompt)
        return Batch.of(sequences, lengths, has_prompts=has_prompts)

    def _will_give(self, sequence: RunningSequence) -> bool:
        """Whether others can take over more of a sequence soon: its prompt runs, or its K/V are about to be shared."""
        is_shared_next = self.replicated and self.num_ranks > 1 and sequence.num_added <= 1
        return not self._is_ready(sequence) or is_shared_next

    def _awaits(self, prompt: RunningSequence, leaders: Sequence[RunningSequence]) -> bool:
        """Whether a prompt of which nothing has run waits for an older one that runs now and begins alike.

        Those of several completions come together; one of them runs what they share. If none is worth waiting for, the
        prompt takes over what running sequences have by now.
        """
        if not self._reuses_prefixes or prompt.cached:
            return False
        pool = self._pool(prompt.home)
        mates = [Holding(s.row, s.token_ids, len(s.token_ids)) for s in leaders if self._pool(s.home) is pool]
        awaited = pool.find(prompt.token_ids, mates, free=False)
        known = pool.find(prompt.token_ids, self._held_at(pool), free=False)
        if known is not None and known.positions > prompt.start:
            prompt.prefix = known
        return awaited is not None and awaited.positions >= prompt.start + LEAST_PREFIX

    def _is_ready(self, sequence: RunningSequence) -> bool:
        """Whether a sequence runs one token, its last one (or the next one of a state that takes no more)."""
        return sequence.start > 0 and (sequence.num_missing == 1 or not self._cuts_prompts)

    def _grow(self, sequence: RunningSequence, end: int) -> bool:
        """Let a sequence have memory up to a position, if need be from younger ones; False = it has to wait itself."""
        pool = self._pool(sequence.home)
        while not pool.claim(sequence.row, end):
            youngest = self._youngest(pool)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow_by(self, prompt: RunningSequence, length: int) -> int:
        """Let a prompt have memory for so many tokens, or for fewer; how many. Younger sequences give way to one."""
        if length <= 0:
            return 0
        pool = self._pool(prompt.home)
        room = pool.room(prompt.row)
        while room is not None and room <= prompt.start and (youngest := self._youngest(pool)) is not prompt:
            self._preempt(youngest)
            room = pool.room(prompt.row)
        length = length if room is None else min(length, room - prompt.start)
        if length <= 0:
            return 0
        claimed = pool.claim(prompt.row, prompt.start + length)
        assert claimed
        return length

    def _youngest(self, pool: RowPool) -> RunningSequence:
        return next(sequence for sequence in reversed(self.running) if self._pool(sequence.home) is pool)

    def _preempt(self, sequence: RunningSequence) -> None:
        """Let a sequence wait again, before all others, with the tokens that it has got."""
        request = sequence.request
        self.release(sequence)
        self.waiting.appendleft(request)
        self.order.insist(request.request_id)
        self._added[request.request_id] = sequence.added
        self._logprobs[request.request_id] = dict(sequence.logprobs)

    def _chunk(self, missing: int, room: int, *, is_first: bool) -> int:
        """How many tokens a prompt that lacks `missing` gets of `room`; 0 = it has to wait."""
        if self._cuts_prompts:
            return min(missing, room)
        return missing if is_first or missing <= room else 0

    def _admit(self, room: int, *, is_first: bool) -> RunningSequence | None:
        """Give the request that goes next a place, if there is one and it gets a token of `room`.

        Where one that would overtake others does not fit, the first goes instead, if it does.
        """
        if not self.waiting or sum(map(len, self._pools)) <= self.kept_free:
            return None
        chosen = 0
        if self.order.most_overtaken:
            waiting = (request.request_id for request in self.waiting)
            chosen = self.order.choose(waiting, (sequence.request.request_id for sequence in self.running))
        for index in sorted({chosen, 0}, reverse=True):
            request = self.waiting[index]
            if not self._chunk(len(request.token_ids) + len(self.added(request)), room, is_first=is_first):
                continue
            sequence = self.place(request, added=self.added(request), reuse=self._reuses_prefixes)
            if sequence is not None:
                sequence.logprobs.update(self.logprobs(request))
                self.order.admit((self.waiting[other].request_id for other in range(index)), request.request_id)
                del self.waiting[index]
                self._forget(request.request_id)
                return sequence
        return None

    def place(self, request: Request, *, added: Sequence[int] = (), reuse: bool = False) -> RunningSequence | None:
        """A sequence at the home with the fewest sequences (the lowest of equals); None = no row is free, or there is
        no memory for its tokens and the next one.

        Args:
            added: tokens that it has got before.
            reuse: let it begin with what a row holds of its tokens: at the home where that is most, of those which
                have at most one sequence more than another.
        """
        load = [0] * self.num_ranks
        for sequence in self.running:
            load[sequence.home] += 1
        known = [*request.token_ids, *added]
        homes = [home for home in range(self.num_ranks) if self._has_place(home, len(known))]
        if not homes:
            return None
        least = min(load[home] for home in homes)
        prefixes = {home: self._find_prefix(known, home) for home in homes if reuse and load[home] <= least + 1}

        def order(home: int) -> tuple[int, int]:
            prefix = prefixes.get(home)
            return (-prefix.positions if prefix else 0), load[home]

        home = min(homes, key=order)
        prefix, pool = prefixes.get(home), self._pool(home)
        row = pool.take_for(prefix, min(len(known) + 1, self.positions))
        sequence = RunningSequence(request, home, row, known, prefix=prefix)
        if not reuse:
            claimed = pool.claim(row, len(known))
            assert claimed
        self.running.append(sequence)
        return sequence

    def make_room(self, tokens: int) -> None:
        """For a check of the ranks: let a row that is free have memory for so many tokens, from sequences that run."""
        for home in range(self.num_ranks):
            pool = self._pool(home)
            while len(pool) and not self._has_place(home, tokens) and pool in map(self._pool_of, self.running):
                self._preempt(self._youngest(pool))
            if self._has_place(home, tokens):
                return

    def _has_place(self, home: int, tokens: int) -> bool:
        pool = self._pool(home)
        room = pool.room()
        return len(pool) > 0 and (room is None or room >= min(tokens + 1, self.positions))

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
        self._lend_rows()

    def _lend_rows(self) -> None:
        """Free rows stay as they are while sequences are about to copy from them."""
        for pool in self._pools:
            mates = (sequence for sequence in self.running if self._pool(sequence.home) is pool)
            pool.lend(s.prefix.row for s in mates if s.prefix is not None and s.prefix.row != s.row)

    def _find_prefix(self, token_ids: Sequence[int], home: int) -> Prefix | None:
        """What a row at a home holds of the beginning of a prompt."""
        return self._pool(home).find(token_ids, self._held_at(self._pool(home)))

    def _held_at(self, pool: RowPool) -> list[Holding]:
        """What running sequences hold there that others may take over."""
        mates = (sequence for sequence in self.running if self._pool(sequence.home) is pool)
        return [Holding(s.row, s.token_ids, self._usable(s)) for s in mates]

    def _usable(self, sequence: RunningSequence) -> int:
        """Positions of a sequence whose K/V are wherever one of another home, or of the same one, may want them."""
        return sequence.replicated if self.replicated else sequence.cached

    def _forget(self, request_id: str) -> None:
        """What a request had got before; it does not wait any more."""
        self.order.forget(request_id)
        self._added.pop(request_id, None)
        self._logprobs.pop(request_id, None)

    def _pool_of(self, sequence: RunningSequence) -> RowPool:
        return self._pool(sequence.home)

    def _pool(self, home: int) -> RowPool:
        return self._pools[0 if len(self._pools) == 1 else home]
