"""Logits of given token sequences, by the same passes that serve requests.

Shape letters: V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from moeplace.placement.modes import Mode
from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.modes import Phase
from moeplace.runtime.engine.placed_experts import by_home
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.engine.whole_executor import WholeExecutor
from moeplace.runtime.exchange.dispatcher import TokenRows

ChooseMode = Callable[[Phase, int], Mode]
"""(phase, tokens of the pass) -> its mode."""


class Scorer:
    """Scores sequences in rows of the K/V cache that no request uses. All ranks call it together."""

    def __init__(
        self, executor: Executor | WholeExecutor, scheduler: Scheduler, group: RankGroup, choose_mode: ChooseMode
    ) -> None:
        self._executor, self._scheduler, self._group, self._choose_mode = executor, scheduler, group, choose_mode

    def score(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> list[torch.Tensor]:
        """(length, V) logits of each sequence, on every rank; the first `prompt_lengths` of its tokens by prefill.

        Raises:
            InputError: a sequence does not fit, a token id is out of range, or no row is free.
        """
        results: list[torch.Tensor] = []
        pending = list(zip(sequences, prompt_lengths, strict=True))
        while pending:
            placed: list[tuple[RunningSequence, int]] = []
            while pending and (sequence := self._place(pending[0][0], len(results) + len(placed))) is not None:
                placed.append((sequence, pending.pop(0)[1]))
            if not placed:
                raise InputError("no row of the K/V cache is free for scoring; finish running requests first")
            results += self._score_placed(placed)
        return results

    def _place(self, token_ids: Sequence[int], index: int) -> RunningSequence | None:
        if len(token_ids) > self._scheduler.positions:
            raise InputError(
                f"sequence {index} has {len(token_ids)} tokens, but the K/V cache holds at most "
                f"{self._scheduler.positions} per sequence"
            )
        request = Request(f"score {index}", tuple(token_ids))
        request.require_tokens(self._executor.decoder.vocabulary)
        return self._scheduler.place(request)

    def _score_placed(self, placed: list[tuple[RunningSequence, int]]) -> list[torch.Tensor]:
        sequences, lengths = [s for s, _ in placed], [length for _, length in placed]
        mode = self._choose_mode("prefill", sum(lengths))
        rows = self._executor.prefill(sequences, mode, lengths=lengths)
        logits = self._gather_logits(rows, sum(lengths))
        length_of = dict(zip(map(id, sequences), lengths, strict=True))
        ordered = by_home(sequences)
        blocks = logits.split([length_of[id(sequence)] for sequence in ordered])
        parts = {id(sequence): [block] for sequence, block in zip(ordered, blocks, strict=True)}
        while active := [s for s in ordered if s.cached < len(s.token_ids)]:
            rows = self._executor.decode(active, self._choose_mode("decode", len(active)))
            for sequence, row in zip(active, self._gather_logits(rows, len(active)), strict=True):
                parts[id(sequence)].append(row[None])
        for sequence in sequences:
            self._scheduler.release(sequence)
        return [torch.cat(parts[id(sequence)]) for sequence in sequences]

    @torch.inference_mode()
    def _gather_logits(self, rows: TokenRows, num_tokens: int) -> torch.Tensor:
        """(num_tokens, V): every token's logits come from one rank, the others add zero."""
        decoder = self._executor.decoder
        logits = torch.zeros(num_tokens, decoder.vocabulary, dtype=decoder.logits_dtype, device=decoder.device)
        logits[rows.token] = decoder.logits(rows.x)
        if self._group.size > 1:
            self._group.all_reduce(logits, kind="logits")
        return logits
