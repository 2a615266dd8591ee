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

Results are the same as with one exchange at the end of the step. What is on its way belongs to the step before: who
reads the cache otherwise calls `drain` first, and who has lost a rank takes that step back.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.exchange import KvTransfer, SharedKv

StepT = TypeVar("StepT")


class KvStream(Generic[StepT]):
    """Ledgers and exchanges of a sequence of steps.

    A step is whatever its owner needs to store what comes from others: it travels along with the exchange, so it need
    not be found again by a number.

    Attributes:
        starts: first layer of each piece.
        pieces: how many there are.
    """

    def __init__(
        self,
        group: RankGroup,
        exchanging: Sequence[int],
        *,
        num_layers: int,
        pieces: int,
        keep: Callable[[StepT, SharedKv], None],
    ) -> None:
        """`keep(step, shared)` stores K/V that came from others, with the step they belong to.

        Args:
            exchanging: layers with an exchange of tokens, ascending: with one of them a piece ends.
            num_layers: all layers with K/V.

        Raises:
            InputError: there are fewer of those layers than pieces.
        """
        count = len(exchanging)
        if not 1 <= pieces <= count:
            raise InputError(f"pieces ({pieces}) must lie in 1..{count}, the number of layers")
        self.pieces = pieces
        self._lasts = [exchanging[(piece + 1) * count // pieces - 1] for piece in range(pieces)]
        self.starts = [0, *(last + 1 for last in self._lasts[:-1])]
        self._has_end = self._lasts[-1] == num_layers - 1  # else layers follow that nobody announces
        self._group = group.background()
        self._keep = keep
        self._pending: dict[int, tuple[StepT, KvTransfer]] = {}

    def ledger(self, step: StepT, layer: int, current: KvLedger | None) -> KvLedger:
        """The ledger of a layer: a new one where a piece begins, after that piece of the step before has arrived."""
        if layer in self.starts:
            piece = self.starts.index(layer)
            self._finish(piece)
            opposite = (piece + self.pieces // 2) % self.pieces
            if opposite in self._pending:
                self._pending[opposite][1].relay()
            current = KvLedger()
        assert current is not None
        if layer in self._lasts and (self._has_end or layer != self._lasts[-1]):
            piece, ledger = self._lasts.index(layer), current

            def set_out() -> None:
                self._pending[piece] = (step, KvTransfer(self._group, ledger))

            ledger.on_announced = set_out
        return current

    def end_step(self, step: StepT, current: KvLedger) -> None:
        """Let the last piece set out, where layers follow the last exchange."""
        if not self._has_end:
            self._pending[self.pieces - 1] = (step, KvTransfer(self._group, current))

    def holds_only(self, step: StepT) -> bool:
        """Whether everything of other steps has arrived."""
        return all(pending is step for pending, _ in self._pending.values())

    def drain(self) -> None:
        """Wait for all pieces that are on their way, in the order in which they set out."""
        for piece in list(self._pending):
            self._finish(piece)

    def _finish(self, piece: int) -> None:
        if piece in self._pending:
            step, transfer = self._pending.pop(piece)
            self._keep(step, transfer.finish())


def default_pieces(exchanging: int, num_nodes: int) -> int:
    """Pieces for so many layers with an exchange.

    Between nodes one for every layer: small pieces fill the gaps that the exchanges of tokens leave on slow links, and
    long messages that cross each other on a link hinder each other. Within one node one for every two layers, because
    there an exchange costs more than it hides.
    """
    return exchanging if num_nodes > 1 else -(-exchanging // 2)
