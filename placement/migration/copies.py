"""What must be copied, from where, and what must wait for what.

A copy into a place may land only when all copies that read the place have landed. Since a place is written at most
once, these waits form trees and cycles; a cycle lands at once. A cycle that would stage more than the budget on a rank
is split by exchanging two of the rank's experts first, which costs nothing between ranks.

Shape letters: L MoE layers, E experts per layer, S slots per layer, P places per layer, U members.
"""

from dataclasses import dataclass, field

import numpy as np

from moeplace.placement.migration.layout import Layout
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError

CHECKPOINT = -1
"""Source of an expert that no surviving rank holds."""


@dataclass(slots=True)
class Copy:
    """One expert from a place to a place of the same layer; `source` CHECKPOINT = from disk."""

    layer: int
    expert: int
    source: int
    target: int
    sender: int
    receiver: int
    size: int

    @property
    def is_remote(self) -> bool:
        """Whether two ranks take part."""
        return self.sender not in (CHECKPOINT, self.receiver)

    @property
    def is_staged(self) -> bool:
        """Whether the receiver needs a buffer for it."""
        return self.sender != self.receiver


@dataclass(slots=True, eq=False)
class Bundle:
    """Copies that land at the same time.

    Attributes:
        copies: in an order in which local copies can be written one after the other.
        waits: bundles that must land first and have not.
        releases: bundles that wait for this one.
        strict: those that wait may not even be sent in the round in which this one lands.
        cyclic: the copies form a cycle of places.
    """

    copies: list[Copy]
    waits: int = 0
    releases: list["Bundle"] = field(default_factory=list)
    strict: bool = False
    cyclic: bool = False

    def staged_bytes(self) -> dict[int, int]:
        """Bytes each receiving member stages until it lands; a purely local cycle passes through one buffer."""
        staged: dict[int, int] = {}
        for copy in self.copies:
            if copy.is_staged:
                staged[copy.receiver] = staged.get(copy.receiver, 0) + copy.size
        if not staged and self.cyclic:
            staged[self.copies[0].receiver] = min(copy.size for copy in self.copies)
        return staged


def list_copies(
    old: Placement, new: Placement, layout: Layout, size_LE: np.ndarray, node_U: np.ndarray
) -> list[list[Copy]]:
    """Per layer, the copies that turn `old` into `new`; sources: same rank, same node, then the least busy rank."""
    before_LP, after_LP = places(old, new, layout)
    wanted_LP = (after_LP >= 0) & (after_LP != before_LP)
    busy_U = np.zeros(layout.num_members, np.int64)  # bytes sent and received
    for layer, place in np.argwhere(wanted_LP):
        busy_U[layout.member_of_place[place]] += size_LE[layer, after_LP[layer, place]]
    layers: list[list[Copy]] = []
    for layer in range(old.num_layers):
        holders: dict[int, list[int]] = {}
        for place in np.flatnonzero(before_LP[layer] >= 0).tolist():
            holders.setdefault(int(before_LP[layer, place]), []).append(place)
        copies = []
        for target in np.flatnonzero(wanted_LP[layer]).tolist():
            expert, receiver = int(after_LP[layer, target]), int(layout.member_of_place[target])
            size = int(size_LE[layer, expert])
            source = _nearest(holders.get(expert, []), receiver, layout.member_of_place, node_U, busy_U)
            sender = CHECKPOINT if source == CHECKPOINT else int(layout.member_of_place[source])
            if sender != CHECKPOINT:
                busy_U[sender] += size
            copies.append(Copy(layer, expert, source, target, sender, receiver, size))
        layers.append(copies)
    return layers


def places(old: Placement, new: Placement, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """((L, P), (L, P)) int32 expert of each place before and after, -1 = none or lost."""
    shape = (old.num_layers, len(layout.member_of_place))
    before_LP, after_LP = (np.full(shape, EMPTY_SLOT, np.int32) for _ in range(2))
    before_LP[:, layout.place_of_old] = old.slot_to_expert
    before_LP[:, layout.lost_places] = EMPTY_SLOT
    after_LP[:, layout.place_of_new] = new.slot_to_expert
    return before_LP, after_LP


def bundle_copies(copies: list[Copy], before_P: np.ndarray, size_E: np.ndarray, staging_bytes: int) -> list[Bundle]:
    """Bundles of one layer with their waits, in canonical order; cycles beyond the budget are split.

    Raises:
        InputError: one expert alone exceeds the staging budget.
    """
    for copy in copies:
        if copy.size > staging_bytes:
            raise InputError(
                f"staging ({staging_bytes} bytes) must hold expert {copy.expert} of MoE layer {copy.layer} "
                f"({copy.size} bytes)"
            )
    before_P = before_P.copy()
    touched: dict[int, Bundle] = {}
    exchanges: list[Bundle] = []
    pending, bundles = _cycles(copies), []
    while pending:
        cycle = pending.pop()
        pair = _over_budget(cycle, staging_bytes)
        if pair is None:
            bundles.append(Bundle(_in_writing_order(cycle), cyclic=True))
            continue
        exchange = _exchange(*pair, copies, before_P, size_E)
        for place in (pair[0].target, pair[1].target):
            if place in touched:
                _wait(exchange, touched[place])
            touched[place] = exchange
        exchanges.append(exchange)
        pending += _cycles(cycle)
    in_cycle = {id(copy) for bundle in bundles for copy in bundle.copies}
    bundles = exchanges + bundles + [Bundle([copy]) for copy in copies if id(copy) not in in_cycle]
    _link(bundles[len(exchanges) :], touched)
    return bundles


def _nearest(
    holders: list[int], receiver: int, member_of_place: np.ndarray, node_U: np.ndarray, busy_U: np.ndarray
) -> int:
    """The place to read from, CHECKPOINT when there is none."""

    def distance(place: int) -> tuple[bool, bool, int, int]:
        member = member_of_place[place]
        return member != receiver, node_U[member] != node_U[receiver], int(busy_U[member]), place

    return min(holders, key=distance, default=CHECKPOINT)


def _cycles(copies: list[Copy]) -> list[list[Copy]]:
    """Cycles of copies, each reading the place that the next one writes."""
    writer = {copy.target: copy for copy in copies}
    seen: dict[int, int] = {}  # target -> walk that came by
    found = []
    for walk, start in enumerate(copies):
        copy: Copy | None = start
        while copy is not None and copy.target not in seen:
            seen[copy.target] = walk
            copy = writer.get(copy.source)
        if copy is not None and seen[copy.target] == walk:
            cycle = [copy]
            while (following := writer[cycle[-1].source]) is not copy:
                cycle.append(following)
            found.append(cycle)
    return found


def _over_budget(cycle: list[Copy], staging_bytes: int) -> tuple[Copy, Copy] | None:
    """Two arrivals at a rank that would stage more than the budget, the closest ones: a short cycle splits off."""
    staged = Bundle(cycle).staged_bytes()
    best: tuple[int, int, int] | None = None
    last: dict[int, int] = {}
    for position, copy in enumerate(cycle):
        if copy.is_staged and staged[copy.receiver] > staging_bytes:
            if copy.receiver in last:
                first = last[copy.receiver]
                best = min(best or (len(cycle), 0, 0), (position - first, first, position))
            last[copy.receiver] = position
    return None if best is None else (cycle[best[1]], cycle[best[2]])


def _exchange(one: Copy, other: Copy, copies: list[Copy], before_P: np.ndarray, size_E: np.ndarray) -> Bundle:
    """Let the experts in the two targets (of one rank) change places; whoever reads them reads the other place."""
    a, b = one.target, other.target
    local = [
        Copy(one.layer, int(before_P[x]), x, y, one.receiver, one.receiver, int(size_E[before_P[x]]))
        for x, y in ((a, b), (b, a))
    ]
    for copy in copies:
        if copy.source in (a, b):
            copy.source = a + b - copy.source
    before_P[[a, b]] = before_P[[b, a]]
    return Bundle(local, strict=True, cyclic=True)


def _in_writing_order(cycle: list[Copy]) -> list[Copy]:
    """Rotated so that what the first copy overwrites has already left the rank, where any has."""
    first = next((i for i, copy in enumerate(cycle) if copy.is_remote), -1) + 1
    return cycle[first:] + cycle[:first]


def _link(bundles: list[Bundle], touched: dict[int, Bundle]) -> None:
    """The bundle that writes a place waits for those that read it; whoever uses exchanged places waits for that."""
    writer = {copy.target: bundle for bundle in bundles for copy in bundle.copies}
    for bundle in bundles:
        first_L = {id(touched[p]): touched[p] for c in bundle.copies for p in (c.source, c.target) if p in touched}
        for exchange in first_L.values():
            _wait(bundle, exchange)
        for copy in bundle.copies:
            following = writer.get(copy.source)
            if following is not None and following is not bundle:
                _wait(following, bundle)


def _wait(bundle: Bundle, first: Bundle) -> None:
    bundle.waits += 1
    first.releases.append(bundle)
