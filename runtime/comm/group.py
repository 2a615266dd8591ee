"""RankGroup: one process group. Every collective of the runtime goes through it and is counted there.

Groups are raw process groups on a prefix of a store, not the global default group: a new membership is a new group
under a new prefix, and several can be alive at once.

Shape letters: R ranks.
"""

import atexit
import hashlib
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.agreement import Agreement
from moeplace.runtime.comm.backend import first_sentence, make_process_group, tells_of_lost_peer, watch_over
from moeplace.runtime.comm.devices import DEVICES, ThisMachine, device_of
from moeplace.runtime.counters import OUTSIDE, TIERS, Counters
from moeplace.runtime.errors import PeerLostError

logger = logging.getLogger(__name__)

_OPEN: "weakref.WeakSet[RankGroup]" = weakref.WeakSet()
"""Groups of this process that nobody has closed."""


class PendingExchange:
    """An all-to-all on its way; `wait` ends it. Its tensors must stay as they are until then."""

    def __init__(
        self, group: "RankGroup", work: "dist.Work", kind: str, tensors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._group, self._kind = group, kind
        self._works = [work]  # none once it has ended: it keeps the connections open
        self._tensors = tensors  # alive as long as this is

    def wait(self) -> None:
        """Block until what was to be received is there.

        Raises:
            PeerLostError: a peer is gone.
        """
        self._group._under_way.discard(self)
        with self._group.counters.timed("exchange"), self._group._guard(self._kind):
            self._group._end(self._works.pop(), self._kind)

    def wait_out(self) -> None:
        """Block until it has ended, well or not; nobody wants what it brings."""
        with suppress(Exception):
            self._works.pop().wait()


class RankGroup:
    """A process group that counts.

    Attributes:
        rank: this rank.
        size: ranks in the group.
        node_of_rank: (R,) int64, node of each rank; decides the tier of every byte.
        device: where tensors of collectives live.
        counters: where collectives and bytes are counted; shared with the node group.
        short_messages: whether a receive buffer may be larger than what arrives, see `all_to_all`.
        observer: called with the kind of each collective before it is issued, and with "agreement" before one of
            those; a background group inherits it.
        while_waiting: called now and then while this rank waits in an agreement, where nobody else tells it that a peer
            has gone; raises PeerLostError when it knows of one.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        size: int,
        timeout: float,
        node_of_rank: np.ndarray | None = None,
        device: str | torch.device = "cpu",
        counters: Counters | None = None,
        short_messages: bool | None = None,
    ) -> None:
        """Connect to the other ranks of `store`.

        Args:
            timeout: seconds after which a collective that does not end is given up.
            short_messages: None = what the back end can do; False pads every message to its capacity, as NCCL needs.

        Raises:
            PeerLostError: not all ranks came within the timeout.
        """
        self.rank, self.size, self.timeout = rank, size, timeout
        self.device = torch.device(device)
        self.counters = Counters() if counters is None else counters
        self.node_of_rank = np.zeros(size, dtype=np.int64) if node_of_rank is None else np.asarray(node_of_rank)
        if len(self.node_of_rank) != size:
            raise InputError(f"there are {size} ranks, but node_of_rank lists {len(self.node_of_rank)}")
        self.observer: Callable[[str], None] = _ignore
        self.while_waiting: Callable[[], None] = _look_at_nothing
        self._store = store
        self._agreement = Agreement(store, rank=rank, size=size, guard=self._guard)
        self._derived: Counter[str] = Counter()
        self._layer, self._mode = OUTSIDE, ""
        self._node_group: RankGroup | None = None
        self._background: RankGroup | None = None
        self._under_way: set[PendingExchange] = set()
        on_node = self.node_of_rank == self.node_of_rank[rank]
        tier = np.where(on_node, 1, 2)
        tier[rank] = 0
        self._tier_of_peer: list[str] = [TIERS[t] for t in tier]
        with self._guard("connecting"):
            self._group = make_process_group(store, rank, size, timeout, self.device)
            # What is said in bytes goes by gloo also where tensors go by NCCL; made second, on all ranks alike.
            self._control = self._group
            if self.device.type != "cpu":
                self._control = make_process_group(store, rank, size, timeout, torch.device("cpu"))
        self._watch = watch_over(self._group, self.device, timeout)
        _OPEN.add(self)
        gloo = self.device.type == "cpu"
        self.short_messages = gloo if short_messages is None else short_messages and gloo

    @classmethod
    def from_environment(cls, *, timeout: float, node_of_rank: np.ndarray | None = None, device: str = "auto") -> Self:
        """Connect to the ranks that torchrun (or a launcher that sets the same variables) started.

        Without those variables the group is this one process.

        Args:
            device: cpu, cuda or auto, see `device_of`; or one GPU by its number, as cuda:0.

        Raises:
            InputError: there is no GPU for this rank.
            PeerLostError: not all ranks came within the timeout.
        """
        if device in DEVICES:
            device = str(device_of(device, int(os.environ.get("LOCAL_RANK", "0")), ThisMachine()))
        if "RANK" not in os.environ:
            return cls(dist.HashStore(), rank=0, size=1, timeout=timeout, device=device)
        limit = timedelta(seconds=timeout)
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        store.set_timeout(limit)
        # A fresh prefix per attempt: torchrun restarts all workers on the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"moeplace/{attempt}", store)
        return cls(store, rank=rank, size=size, timeout=timeout, node_of_rank=node_of_rank, device=device)

    def with_nodes(self, node_of_rank: np.ndarray) -> "RankGroup":
        """The same ranks, told apart by another node map: a new group on the same store."""
        if np.array_equal(node_of_rank, self.node_of_rank):
            return self
        digest = hashlib.sha256(np.asarray(node_of_rank, dtype=np.int64).tobytes()).hexdigest()[:12]
        return self._derive(f"nodes-{digest}", list(range(self.size)), node_of_rank)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank[-1]) + 1

    @property
    def node_ranks(self) -> list[int]:
        """The ranks of this rank's node."""
        return np.flatnonzero(self.node_of_rank == self.node_of_rank[self.rank]).tolist()

    def node_group(self) -> "RankGroup":
        """The group of this rank's node, made on first use (every rank of the node must then ask for it)."""
        if self._node_group is None:
            mates = self.node_ranks
            prefix = f"node{self.node_of_rank[self.rank]}"
            self._node_group = self._derive(prefix, mates, np.zeros(len(mates), np.int64))
        return self._node_group

    def background(self) -> "RankGroup":
        """A second group of the same ranks, made on first use: its collectives may be under way beside this one's."""
        if self._background is None:
            self._background = self._derive("background", list(range(self.size)), self.node_of_rank)
            self._background.observer = self.observer
        return self._background

    def _derive(self, prefix: str, ranks: list[int], node_of_rank: np.ndarray) -> "RankGroup":
        """A group of some of the ranks on the same store; all of them must ask for it, in the same order.

        The k-th group of a prefix has a prefix of its own: what the first one wrote there is of no use to the second.
        """
        self._derived[prefix] += 1
        return RankGroup(
            dist.PrefixStore(f"{prefix}/{self._derived[prefix]}", self._store),
            rank=ranks.index(self.rank),
            size=len(ranks),
            timeout=self.timeout,
            node_of_rank=node_of_rank,
            device=self.device,
            counters=self.counters,
            short_messages=self.short_messages,
        )

    @contextmanager
    def layer(self, layer: int, *, mode: str) -> Iterator[None]:
        """One pass of an MoE layer in a mode: collectives inside belong to it."""
        self.counters.layer_passes[mode] += 1
        groups = [self] if self._node_group is None else [self, self._node_group]
        for group in groups:
            group._layer, group._mode = layer, mode
        try:
            yield
        finally:
            for group in groups:
                group._layer = OUTSIDE

    def close(self) -> None:
        """Leave: the threads of the group, and of those made from it, end.

        An exchange that is still on its way is waited for here: a back end would do so too, but hold up all threads
        of this process meanwhile, signs of life among them. This group goes before those made from it: others who wait
        in it hear so that this rank has left, leave as well, and what was on its way ends.

        What nobody closes is closed when Python ends: threads that outlive it would abort the process.
        """
        _OPEN.discard(self)
        while self._under_way:
            self._under_way.pop().wait_out()
        if self._watch is not None:
            self._watch.close()
        # The agreement knows this group: without it nothing waits for the garbage collector, least of all a connection.
        for name in ("_group", "_control", "_store", "_agreement"):
            self.__dict__.pop(name, None)
        for group in (self._node_group, self._background):
            if group is not None:
                group.close()
        self._node_group = self._background = None

    def agree(self, items: dict[str, str]) -> None:
        """Compare values over all ranks, through the store: no collective is issued.

        Raises:
            DisagreementError: some rank has another value, or gave up; every rank raises it.
            PeerLostError: a rank did not report in time.
        """
        self.observer("agreement")
        self._agreement.reach(items, timeout=self.timeout, look=self.while_waiting)

    def give_up(self, reason: str) -> None:
        """Tell ranks that wait in `agree` that this one will not come."""
        self._agreement.give_up(reason)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        kind: str,
    ) -> None:
        """Send consecutive blocks of rows of `input` to the ranks; receive into consecutive blocks of `output`.

        With `short_messages` an entry of `output_splits` is a capacity: gloo receives what was sent and leaves the rest
        of the block alone, so that no size has to be agreed and nothing is padded on the wire. Otherwise both sides
        must name the same sizes.

        Args:
            output: (sum of output_splits, ...) contiguous.
            input: (sum of input_splits, ...) contiguous.
            kind: the name under which it is counted.

        Raises:
            PeerLostError: a peer is gone.
        """
        self.start_all_to_all(output, input, output_splits, input_splits, kind=kind).wait()

    def start_all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        kind: str,
    ) -> PendingExchange:
        """`all_to_all` that goes on while the caller computes; all ranks start and wait in the same order."""
        row_bytes = input.element_size() * int(np.prod(input.shape[1:], dtype=np.int64))
        with self._issued(kind, [rows * row_bytes for rows in input_splits]):
            work = self._group.alltoall_base(output, input, list(output_splits), list(input_splits))
        pending = PendingExchange(self, work, kind, (output, input))
        self._under_way.add(pending)
        return pending

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, kind: str) -> None:
        """`output` (R, ...) gets `input` (...) of every rank."""
        size = input.numel() * input.element_size()
        with self._issued(kind, [size] * self.size):
            self._end(self._group_of(input)._allgather_base(output.view(-1), input.view(-1)), kind)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, *, kind: str) -> None:
        """`output` (...) gets the sum over ranks of this rank's block of `input` (R, ...)."""
        size = output.numel() * output.element_size()
        with self._issued(kind, [size] * self.size):
            self._end(self._group._reduce_scatter_base(output.view(-1), input.view(-1)), kind)

    def all_reduce(self, tensor: torch.Tensor, *, kind: str) -> None:
        """Sum over ranks, in place."""
        # A ring sends every element 2 (R - 1) / R times; spread evenly over the peers.
        size = 2 * tensor.numel() * tensor.element_size() // self.size
        with self._issued(kind, [size] * self.size):
            self._end(self._group.allreduce([tensor]), kind)

    def broadcast(self, tensor: torch.Tensor, *, root: int, kind: str) -> None:
        """Overwrite `tensor` with that of `root`."""
        size = tensor.numel() * tensor.element_size()
        with self._issued(kind, [size if self.rank == root else 0] * self.size):
            self._end(self._group_of(tensor).broadcast(tensor, root), kind)

    def broadcast_bytes(self, content: bytes, *, root: int, kind: str) -> bytes:
        """The bytes of `root`, on every rank."""
        if self.size == 1:
            return content
        length = torch.tensor([len(content)], dtype=torch.int64)
        self.broadcast(length, root=root, kind=kind)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.rank == root and content:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        if len(buffer):
            self.broadcast(buffer, root=root, kind=kind)
        return buffer.numpy().tobytes()

    def all_gather_bytes(self, content: bytes, *, kind: str) -> list[bytes]:
        """The bytes of every rank, on every rank."""
        if self.size == 1:
            return [content]
        length = torch.tensor([len(content)])
        lengths_R = length.new_empty(self.size, 1)
        self.all_gather(lengths_R, length, kind=kind)
        lengths = lengths_R.flatten().tolist()
        mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        if content:
            mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        everyone = mine.new_empty(self.size, len(mine))
        self.all_gather(everyone, mine, kind=kind)
        return [row[:size].tobytes() for row, size in zip(everyone.numpy(), lengths, strict=True)]

    def raise_if_lost(self) -> None:
        """After a read of what collectives brought: whether they have really ended.

        Raises:
            PeerLostError: one was given up, and what was read is no result.
        """
        if self._watch is not None:
            self._watch.check()

    def open_all(self) -> None:
        """Make every group that is made from this one, in the order that is the same on all ranks.

        NCCL communicators that ranks make in different orders wait for each other.
        """
        if self.size > 1:
            for group in (self, self.background()):
                if self.num_nodes > 1:
                    group.node_group()

    def _group_of(self, tensor: torch.Tensor) -> "dist.ProcessGroup":
        """The back end for a tensor. No variable may hold it: a traceback would keep a group open that is closed."""
        return self._control if tensor.device.type == "cpu" else self._group

    def _end(self, work: "dist.Work", kind: str) -> None:
        """Wait for a collective as far as the back end waits, and have it watched beyond that."""
        if self._watch is not None:
            self._watch.add(work, kind)
        try:
            work.wait()
        finally:
            del work  # a traceback would keep it, and with it the group open
        self.raise_if_lost()

    @contextmanager
    def _issued(self, kind: str, bytes_to_peer: list[int]) -> Iterator[None]:
        """Count and time a collective."""
        self.counters.collectives[self._layer, kind] += 1
        if self._layer != OUTSIDE:
            self.counters.collectives_of_mode[self._mode] += 1
        for tier, sent in zip(self._tier_of_peer, bytes_to_peer, strict=True):
            if sent:
                self.counters.bytes_sent[tier] += sent
        self.observer(kind)
        with self.counters.timed("exchange"), self._guard(kind):
            yield

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not tells_of_lost_peer(error):
                raise
            place = f"MoE layer {self._layer}" if self._layer != OUTSIDE else "no MoE layer"
            logger.debug("rank %d: %s failed", self.rank, doing, exc_info=True)
            raise PeerLostError(
                f"rank {self.rank} of {self.size} lost a peer during {doing} ({place}): "
                f"{first_sentence(str(error))} (timeout {self.timeout:g} s)"
            ) from error


@atexit.register
def _close_all() -> None:
    for group in list(_OPEN):
        group.close()


def _ignore(kind: str) -> None:
    """What observes collectives by default."""


def _look_at_nothing() -> None:
    """Others die unnoticed, or with this process."""
