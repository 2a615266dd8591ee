"""FastPart: who is in the fast memory of a rank, and who leaves when another comes.

The same rules as in the walk that predicts it (`placement.tiers.walk`): rows of a layer are pinned or free to be given
up; where a layer has no free row, what is loaded passes through rows for transit, which all layers share.

Everything here happens with the loader's lock held.

Shape letters: L MoE layers, C storage rows of a layer.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moeplace.placement.tiers.policy import LFU, LRU, SCORE_WEIGHT
from moeplace.runtime.experts.loader import Load


@dataclass(eq=False)
class Held:
    """An expert in fast memory, or on its way there.

    Attributes:
        target: fast row.
        load: None = it is there since the start.
        fresh: fetched ahead, and not used yet.
        in_transit: in a row for transit, until its layer is done.
    """

    target: int
    load: Load | None = None
    fresh: bool = False
    in_transit: bool = False

    @property
    def has_come(self) -> bool:
        return self.load is None or self.load.done.is_set()


class FastPart:
    """See the module.

    Attributes:
        held: per layer, storage row -> what is held of it.
        pinned: per layer, storage rows that stay once they are there.
        step: passes so far.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        *,
        transit: int,
        eviction: int,
        release: Callable[[int], None] = lambda target: None,
    ) -> None:
        """`rows`: fast rows in all, those for transit included; `release`: told of each that is given up."""
        self.held: list[dict[int, Held]] = [{} for _ in range(layers)]
        self.pinned: list[frozenset[int]] = [frozenset()] * layers
        self.step = 0
        self._room = [0] * layers  # rows of a layer that are not pinned
        self._spare = list(range(rows))[::-1]
        self._transit, self._in_transit, self._eviction = transit, 0, eviction
        self._release = release
        self._value: dict[tuple[int, int], float] = {}
        self._touched: dict[tuple[int, int], int] = {}

    def share_out(self, pinned: Sequence[Collection[int]], room: Sequence[int]) -> None:
        """Pin other rows and give layers another number of free ones; what has no row any more leaves."""
        self.pinned = [frozenset(rows) for rows in pinned]
        self._room = list(room)
        for layer, held in enumerate(self.held):
            loose = [row for row in held if row not in self.pinned[layer]]
            for row in sorted(loose, key=lambda row: self._worth(layer, row))[: max(len(loose) - room[layer], 0)]:
                self.give_up(layer, row)

    def put(self, layer: int, row: int, *, wanted: int | None = None) -> int:
        """A fast row, the wanted one where that is spare, for an expert that is put there at the start."""
        target = self._spare[-1] if wanted is None or wanted not in self._spare else wanted
        self._spare.remove(target)
        self.held[layer][row] = Held(target)
        return target

    def give_up(self, layer: int, row: int) -> None:
        """Forget an expert, if it is held."""
        held = self.held[layer].pop(row, None)
        if held is not None:
            self._spare.append(held.target)
            self._release(held.target)
            self._in_transit -= held.in_transit

    def clear(self) -> None:
        """Forget everything; pins and rooms stay."""
        for layer, held in enumerate(self.held):
            for row in list(held):
                self.give_up(layer, row)
        self._value.clear()
        self._touched.clear()

    def take(self, load: Load, *, needed: Collection[int], computed: Sequence[int]) -> bool:
        """A row for an expert that is asked for now; False = none before another has been computed.

        Args:
            load: gets the row.
            needed: storage rows of the layer that this pass asks for.
            computed: those of them that are done, the first one first.
        """
        layer, row = load.layer, load.row
        in_transit = row not in self.pinned[layer] and not self._room[layer]
        if in_transit:
            if self._in_transit >= self._transit:
                return False
            self._in_transit += 1
        elif row not in self.pinned[layer] and self._used(layer) >= self._room[layer]:
            gone = self._victim(layer, needed)
            if gone is None:
                loose = (r for r in computed if r in self.held[layer] and r not in self.pinned[layer])
                gone = next((r for r in loose if not self.held[layer][r].in_transit), None)
            if gone is None:
                return False
            self.give_up(layer, gone)
        load.target = self._spare.pop()
        self.held[layer][row] = Held(load.target, load, in_transit=in_transit)
        return True

    def take_ahead(self, load: Load) -> int | None:
        """A row for what is fetched ahead, None = there is none now; the loader asks when its turn has come."""
        layer, row = load.layer, load.row
        in_transit = False
        if row not in self.pinned[layer] and self._used(layer) >= self._room[layer]:
            gone = self._victim(layer, ()) if self._room[layer] else None
            if gone is not None:
                self.give_up(layer, gone)
            elif self._in_transit + 1 < self._transit:  # one row is left for what is asked for
                self._in_transit += 1
                in_transit = True
            else:
                return None
        target = self._spare.pop()
        self.held[layer][row] = Held(target, load, fresh=True, in_transit=in_transit)
        return target

    def learn_truth(self, layer: int, awaited: Collection[int]) -> list[Load]:
        """The layer's router has spoken: what was fetched ahead and is not awaited may be given up; what of that
        is still on its way is given up at once, its loads are returned."""
        vain = []
        for row, held in list(self.held[layer].items()):
            held.fresh = held.fresh and row in awaited
            if held.load is not None and not held.has_come and row not in awaited and row not in self.pinned[layer]:
                vain.append(held.load)
                self.give_up(layer, row)
        return vain

    def on_its_way(self, layer: int) -> Load | None:
        """A load of the layer that has not come yet."""
        return next((held.load for held in self.held[layer].values() if not held.has_come), None)

    def note_use(self, layer: int, row: int, weight: float) -> None:
        """A pass used an expert, wherever it was computed; `weight`: sum of its gate weights."""
        key = layer, row
        if self._eviction == LFU:
            self._value[key] = self._value.get(key, 0.0) + 1.0
        else:
            self._value[key] = self._faded(key) + SCORE_WEIGHT * weight
        self._touched[key] = self.step
        held = self.held[layer].get(row)
        if held is not None:
            held.fresh = False

    def leave(self, layer: int) -> None:
        """The layer is done: rows for transit are free, what was fetched in vain may be given up."""
        for row, held in list(self.held[layer].items()):
            held.fresh = False
            if held.in_transit and held.has_come:
                self.give_up(layer, row)

    def sweep(self) -> None:
        """Between passes: rows for transit whose load came after its layer was done."""
        for layer in range(len(self.held)):
            self.leave(layer)

    def _used(self, layer: int) -> int:
        pinned = self.pinned[layer]
        return sum(not held.in_transit and row not in pinned for row, held in self.held[layer].items())

    def _victim(self, layer: int, needed: Collection[int]) -> int | None:
        """Of the rows that may go, the one of least worth; what is on its way, or was fetched ahead, stays."""
        pinned = self.pinned[layer]
        loose = [
            row
            for row, held in self.held[layer].items()
            if row not in pinned and row not in needed and not held.in_transit and not held.fresh and held.has_come
        ]
        return min(loose, key=lambda row: self._worth(layer, row), default=None)

    def _worth(self, layer: int, row: int) -> tuple[float, int, int]:
        key = layer, row
        last = self._touched.get(key, 0)
        value = float(last) if self._eviction == LRU else self._value.get(key, 0.0)
        return (value if self._eviction in (LRU, LFU) else self._faded(key)), last, row

    def _faded(self, key: tuple[int, int]) -> float:
        """The moving score as of now."""
        return self._value.get(key, 0.0) * (1.0 - SCORE_WEIGHT) ** (self.step - self._touched.get(key, 0))
