"""Rounds of a migration: in each, a rank talks to at most one peer, one expert in each direction.

Greedy and deterministic: the pair with the most left to do goes first (as in edge colouring of a multigraph), what has
begun is finished first, and a cycle over more than two ranks begins only when every buffer it needs is free. So nothing
ever waits for a buffer that is held by something that waits for it.

Shape letters: U members (ranks of before and after together).
"""

from collections import deque
from dataclasses import dataclass

from moeplace.placement.migration.copies import Bundle, Copy

Pair = tuple[int, int]


@dataclass(frozen=True)
class Scheduled:
    """A copy, staged from the round it is listed in until the end of round `lands`."""

    copy: Copy
    lands: int


def schedule_rounds(bundles: list[Bundle], num_members: int, staging_bytes: int) -> list[list[Scheduled]]:
    """Rounds of copies, each in an order in which local copies can be written one after the other."""
    state = _State(bundles, num_members, staging_bytes)
    while state.left:
        landed = len(state.landed)
        state.run_round()
        assert state.sent or len(state.landed) > landed, "bundles wait for each other in a circle"
    rounds: list[list[Scheduled]] = [[] for _ in range(state.round)]
    for bundle, sent in state.landed:
        lands = max(sent)
        for copy, index in zip(bundle.copies, sent, strict=True):
            rounds[index if copy.is_staged else lands].append(Scheduled(copy, lands))
    return rounds


class _State:
    """What is ready, what has begun, which buffers are free."""

    def __init__(self, bundles: list[Bundle], num_members: int, staging_bytes: int) -> None:
        self.round = 0
        self.left = len(bundles)
        self.free = [staging_bytes] * num_members
        self.degree = [0] * num_members  # remote copies that are not sent yet
        self.single: dict[Pair, deque[Bundle]] = {}  # (sender, receiver) -> ready
        self.exchange: dict[Pair, deque[Bundle]] = {}  # (low, high) -> ready cycles between these two
        self.begun: dict[Pair, deque[tuple[Bundle, int]]] = {}  # (sender, receiver) -> copies of begun cycles
        self.local: deque[Bundle] = deque()  # ready, without a peer
        self.cycles: deque[Bundle] = deque()  # ready, over more than two ranks
        self.later: list[Bundle] = []  # landed in this round, releases at its end
        self.arrived: list[tuple[int, int]] = []  # (member, bytes) staged in this round only
        self.held: list[Bundle] = []  # cycles that land at the end of this round
        self.sent: dict[int, list[int]] = {}  # id of a begun cycle -> round of each copy, -1 = not yet
        self.landed: list[tuple[Bundle, list[int]]] = []
        for bundle in bundles:
            for copy in bundle.copies:
                if copy.is_remote:
                    self.degree[copy.sender] += 1
                    self.degree[copy.receiver] += 1
            if not bundle.waits:
                self._make_ready(bundle)

    def run_round(self) -> None:
        """One round: what needs no peer, new cycles, then pairs by how much they have left to do."""
        self._run_local()
        self._begin_cycles()
        busy: set[int] = set()
        for low, high in sorted(self._pairs(), key=self._urgency):
            if low not in busy and high not in busy and self._run_pair(low, high):
                busy |= {low, high}
        self._run_local()
        self._end_round()

    def _pairs(self) -> set[Pair]:
        queues = (self.single, self.exchange, self.begun)
        return {(min(pair), max(pair)) for queue in queues for pair, waiting in queue.items() if waiting}

    def _urgency(self, pair: Pair) -> tuple[bool, int, int, Pair]:
        one, other = self.degree[pair[0]], self.degree[pair[1]]
        begun = bool(self.begun.get(pair) or self.begun.get(pair[::-1]))
        return not begun, -max(one, other), -(one + other), pair

    def _make_ready(self, bundle: Bundle) -> None:
        remote = [copy for copy in bundle.copies if copy.is_remote]
        if not remote:
            self.local.append(bundle)
        elif not bundle.cyclic:
            self.single.setdefault((remote[0].sender, remote[0].receiver), deque()).append(bundle)
        elif len(remote) == 2 and remote[0].sender == remote[1].receiver and remote[0].receiver == remote[1].sender:
            ends = sorted((remote[0].sender, remote[0].receiver))
            self.exchange.setdefault((ends[0], ends[1]), deque()).append(bundle)
        else:
            self.cycles.append(bundle)

    def _run_local(self) -> None:
        """Local copies and reads of the checkpoint, as far as buffers allow; they may release more of them."""
        progress = True
        while progress:
            progress = False
            for _ in range(len(self.local)):
                bundle = self.local.popleft()
                if self._stage(bundle):
                    self._land(bundle, [self.round] * len(bundle.copies))
                    progress = True
                else:
                    self.local.append(bundle)

    def _begin_cycles(self) -> None:
        """Reserve the buffers of each cycle that finds them all free."""
        for _ in range(len(self.cycles)):
            bundle = self.cycles.popleft()
            need = bundle.staged_bytes()
            if any(self.free[member] < size for member, size in need.items()):
                self.cycles.append(bundle)
                continue
            for member, size in need.items():
                self.free[member] -= size
            self.sent[id(bundle)] = [-1 if copy.is_staged else self.round for copy in bundle.copies]
            for index, copy in enumerate(bundle.copies):
                if copy.is_remote:
                    self.begun.setdefault((copy.sender, copy.receiver), deque()).append((bundle, index))

    def _run_pair(self, low: int, high: int) -> bool:
        """Send at most one expert in each direction; False when nothing could be sent."""
        done = {pair for pair in ((low, high), (high, low)) if self._send_begun(pair)}
        if not done and (queue := self.exchange.get((low, high))) and self._stage(queue[0]):
            self._land(queue[0], [self.round] * len(queue.popleft().copies))
            return True
        # Once more: the first direction may have released something in the other.
        for pair in ((low, high), (high, low), (low, high)):
            if pair not in done and (waiting := self.single.get(pair)) and self._stage(waiting[0]):
                done.add(pair)
                self._land(waiting.popleft(), [self.round])
        return bool(done)

    def _send_begun(self, pair: Pair) -> bool:
        queue = self.begun.get(pair)
        if not queue:
            return False
        bundle, index = queue.popleft()
        sent = self.sent[id(bundle)]
        sent[index] = self.round
        if -1 not in sent:
            self.held.append(bundle)
        return True

    def _stage(self, bundle: Bundle) -> bool:
        """Take buffers for this round, if there are enough."""
        need = bundle.staged_bytes()
        if any(self.free[member] < size for member, size in need.items()):
            return False
        for member, size in need.items():
            self.free[member] -= size
            self.arrived.append((member, size))
        return True

    def _land(self, bundle: Bundle, sent: list[int]) -> None:
        """Book a bundle that lands at the end of this round, and release what waited for it."""
        self.left -= 1
        self.landed.append((bundle, sent))
        for copy in bundle.copies:
            if copy.is_remote:
                self.degree[copy.sender] -= 1
                self.degree[copy.receiver] -= 1
        if bundle.strict:
            self.later.append(bundle)
        else:
            self._release(bundle)

    def _release(self, bundle: Bundle) -> None:
        for waiting in bundle.releases:
            waiting.waits -= 1
            if not waiting.waits:
                self._make_ready(waiting)

    def _end_round(self) -> None:
        for bundle in self.held:
            self._land(bundle, self.sent.pop(id(bundle)))
            for member, size in bundle.staged_bytes().items():
                self.free[member] += size
        for member, size in self.arrived:
            self.free[member] += size
        for bundle in self.later:
            self._release(bundle)
        self.held, self.arrived, self.later = [], [], []
        self.round += 1
