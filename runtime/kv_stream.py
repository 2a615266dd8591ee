"""KvStream: the deferred K/V exchange of coherent decoding, in pieces that travel while layers compute.

K and V of layer l are needed by other ranks at layer l of the *next* step at the earliest. So the layers are cut into
pieces; a piece sets out when its last layer is done, and is waited for in the next step before its first layer:

    step s      | layers of piece 0 | layers of piece 1 |
    piece 0                          =======on its way=======
    step s+1                                            | layers of piece 0 | layers of piece 1 |
    piece 1                                              =======on its way======

Results are the same as with one exchange at the end of the step; the bytes fill the time in which links would be idle.
"""

from collections.abc import Callable

from moeplace.profiling.errors import InputError
from moeplace.runtime.group import RankGroup
from moeplace.runtime.kv_exchange import KvLedger, PendingKv, SharedKv, start_kv


class KvStream:
    """Ledgers and exchanges of a sequence of steps.

    Attributes:
        starts: first layer of each piece.
        pieces: how many there are.
    """

    def __init__(
        self, group: RankGroup, num_layers: int, *, pieces: int, keep: Callable[[int, SharedKv], None]
    ) -> None:
        """`keep(step, shared)` stores K/V that came from others, with the number of the step they belong to.

        Raises:
            InputError: there are fewer layers than pieces.
        """
        if not 1 <= pieces <= num_layers:
            raise InputError(f"pieces ({pieces}) must lie in 1..{num_layers}, the number of layers")
        self.pieces = pieces
        self.starts = [piece * num_layers // pieces for piece in range(pieces)]
        self._ends = [*self.starts[1:], num_layers]
        self._group = group.background()
        self._keep = keep
        self._pending: dict[int, tuple[int, PendingKv]] = {}

    def ledger(self, step: int, layer: int, current: KvLedger | None) -> KvLedger:
        """The ledger of a layer: a new one where a piece begins, after that piece of the step before has arrived."""
        if layer not in self.starts:
            assert current is not None
            return current
        self._finish(self.starts.index(layer))
        return KvLedger()

    def layer_done(self, step: int, layer: int, ledger: KvLedger) -> None:
        """Let a piece set out after its last layer."""
        if layer + 1 in self._ends:
            self._pending[self._ends.index(layer + 1)] = (step, start_kv(self._group, ledger))

    def drain(self) -> None:
        """Wait for all pieces that are on their way."""
        for piece in range(self.pieces):
            self._finish(piece)

    def _finish(self, piece: int) -> None:
        if piece in self._pending:
            step, pending = self._pending.pop(piece)
            self._keep(step, pending.finish())
