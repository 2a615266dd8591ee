"""KvStream: the deferred K/V exchange of coherent decoding, in pieces that travel while layers compute.

K and V of layer l are needed by other ranks at layer l of the *next* step at the earliest. So the layers are cut into
pieces. A piece sets out when the exchange of its last layer is done and the experts compute: links are idle then, and
K/V do not stand in the way of tokens. Half a step later it is passed on inside the nodes; a step later, before its
first layer, it must be there:

    step s      | layers of piece 0 | layers of piece 1 |
    piece 0                     ====between nodes====
    step s+1                                            | layers of piece 0 | layers of piece 1 |
    piece 0                                   inside nodes
    piece 1                                         ====between nodes====

Results are the same as with one exchange at the end of the step.
"""

from collections.abc import Callable

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.exchange import KvTransfer, SharedKv


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
        self._lasts = [start - 1 for start in [*self.starts[1:], num_layers]]
        self._group = group.background()
        self._keep = keep
        self._pending: dict[int, tuple[int, KvTransfer]] = {}

    def ledger(self, step: int, layer: int, current: KvLedger | None) -> KvLedger:
        """The ledger of a layer: a new one where a piece begins, after that piece of the step before has arrived."""
        if layer in self.starts:
            piece = self.starts.index(layer)
            self._finish(piece)
            opposite = (piece + self.pieces // 2) % self.pieces
            if opposite in self._pending:
                self._pending[opposite][1].relay()
            current = KvLedger()
        assert current is not None
        if layer in self._lasts:
            piece, ledger = self._lasts.index(layer), current

            def set_out() -> None:
                self._pending[piece] = (step, KvTransfer(self._group, ledger))

            ledger.on_announced = set_out
        return current

    def drain(self) -> None:
        """Wait for all pieces that are on their way."""
        for piece in sorted(self._pending, key=lambda piece: (self._pending[piece][0], piece)):
            self._finish(piece)

    def _finish(self, piece: int) -> None:
        if piece in self._pending:
            step, transfer = self._pending.pop(piece)
            self._keep(step, transfer.finish())
