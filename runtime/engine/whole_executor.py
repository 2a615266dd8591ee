"""WholeExecutor: forward passes of one rank with a model that runs its own code; see `WholeModel`.

Every sequence has a cache object of the model's own, at its home and nowhere else. Tokens stay at home too, so modes
that move them do not work; all experts of a layer are one exchange, as with an `Executor`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from moeplace.placement.modes import Mode
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.placed_experts import PlacedExperts
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatcher import RoutedTokens, Step, TokenRows
from moeplace.runtime.models.lock_step import run_in_lock_step
from moeplace.runtime.models.whole import WholeModel


class SequenceStates:
    """The cache objects of the sequences of this rank, by row; see `KvCache`, whose place it takes.

    Attributes:
        rows: most sequences.
        positions: most positions of each.
    """

    def __init__(self, *, rows: int, positions: int) -> None:
        self.rows, self.positions = rows, positions
        self._states: dict[int, Any] = {}

    def take(self, row: int) -> Any:
        """The state of a row, which has none until it is put back: a pass that fails leaves nothing half done."""
        return self._states.pop(row)

    def put(self, row: int, state: Any) -> None:
        """Keep the state of a row."""
        self._states[row] = state


class WholeExecutor(PlacedExperts[WholeModel, SequenceStates]):
    """What a rank computes. All ranks must call its methods together, with the same sequences.

    Attributes:
        rewinds: a state that has seen a token cannot forget it.
    """

    rewinds = False

    @torch.inference_mode()
    def run(self, batch: Batch, mode: Mode, *, share: bool = False) -> TokenRows:
        """See `Executor.run`: all sequences side by side. No state is ever shared."""
        self.note_pass(batch)
        ordered, lengths = batch.sequences, batch.lengths
        starts, tokens_of_rank = [sequence.cached for sequence in ordered], batch.tokens_of_rank(self.group.size)
        for sequence in ordered:
            sequence.cached = 0  # until the pass is done: what a broken pass leaves is made again from the tokens
        first = sum(tokens_of_rank[: self.group.rank])
        token = torch.arange(first, first + tokens_of_rank[self.group.rank], device=self.decoder.device)
        passes: list[Callable[[], tuple[torch.Tensor, Any]]] = []
        mine = [index for index, sequence in enumerate(ordered) if sequence.home == self.group.rank]
        for index in mine:
            state = self.cache.take(ordered[index].row) if starts[index] else None
            ids = ordered[index].token_ids[starts[index] : starts[index] + lengths[index]]
            passes.append(partial(self.decoder.forward, ids, state))
        step = Step(tokens_of_rank)
        dispatcher = self.dispatcher(mode)
        assert not isinstance(dispatcher, CoherentDispatcher), "a whole model's tokens stay at home"

        def sum_experts(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return dispatcher.sum_experts(layer, RoutedTokens(hidden, ids, weights, token), step)

        done = run_in_lock_step(passes, self.decoder.calls, sum_experts, device=self.decoder.device)
        self.group.counters.steps += 1
        for index, (_, state) in zip(mine, done, strict=True):
            self.cache.put(ordered[index].row, state)
        for sequence, start, length in zip(ordered, starts, lengths, strict=True):
            sequence.cached = start + length
            sequence.replicated = sequence.cached if self.group.size == 1 else 0
        empty = torch.empty(0, self.decoder.hidden_size, dtype=self.decoder.dtype, device=self.decoder.device)
        return TokenRows(torch.cat([x for x, _ in done]) if done else empty, token)

    def settle(self) -> None:
        """See `Executor.settle`: nothing is ever on its way."""

    def forget_unsettled(self) -> None:
        """See `Executor.forget_unsettled`."""

    def give_kv(
        self, sequences: Sequence[RunningSequence], replicated: Sequence[int], receivers: Sequence[int]
    ) -> None:
        """See `Executor.give_kv`: no state is ever on two ranks, so nothing is given."""
        assert not any(replicated)
