"""Logits of given token sequences, by the same passes that serve requests.

Shape letters: V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from moeplace.placement.modes import Mode
from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.modes import Phase
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
        requests = [self._checked(token_ids, index) for index, token_ids in enumerate(sequences)]
        pending = list(zip(requests, prompt_lengths, strict=True))
        while pending:
            self._scheduler.make_room(len(pending[0][0].token_ids))
            placed: list[tuple[RunningSequence, int]] = []
            while pending and (sequence := self._scheduler.place(pending[0][0])) is not None:
                placed.append((sequence, pending.pop(0)[1]))
            if not placed:
                raise InputError("no row of the K/V cache is free for scoring; finish running requests first")
            results += self._score_placed(placed)
        return results

    def _checked(self, token_ids: Sequence[int], index: int) -> Request:
        """What stands for a sequence that is to have a place; none has one yet when this raises."""
        if len(token_ids) > self._scheduler.positions:
            raise InputError(
                f"sequence {index} has {len(token_ids)} tokens, but the K/V cache holds at most "
                f"{self._scheduler.positions} per sequence"
            )
        request = Request(f"score {index}", tuple(token_ids))
        request.require_tokens(self._executor.decoder.vocabulary)
        return request

    def _score_placed(self, placed: list[tuple[RunningSequence, int]]) -> list[torch.Tensor]:
        """Prompts in chunks, as requests have them; then single tokens."""
        parts: dict[int, list[torch.Tensor]] = {id(sequence): [] for sequence, _ in placed}
        while behind := [(s, length - s.cached) for s, length in placed if s.cached < length]:
            lengths = self._scheduler.share_out(missing for _, missing in behind)
            chunks = Batch.of([s for s, _ in behind[: len(lengths)]], lengths, has_prompts=True)
            self._run(chunks, self._choose_mode("prefill", chunks.num_tokens), parts)
        while active := [s for s, _ in placed if s.num_missing]:
            tokens = Batch.of(active, [1] * len(active), has_prompts=False)
            self._run(tokens, self._choose_mode("decode", len(active)), parts)
        for sequence, _ in placed:
            self._scheduler.release(sequence, keep=False)  # what is scored may be doubtful experts
        return [torch.cat(parts[id(sequence)]) for sequence, _ in placed]

    def _run(self, batch: Batch, mode: Mode, parts: dict[int, list[torch.Tensor]]) -> None:
        """One pass; its logits go behind those that the sequences have got."""
        logits = self._gather_logits(self._executor.run(batch, mode), batch.num_tokens)
        for sequence, block in zip(batch.sequences, logits.split(batch.lengths), strict=True):
            parts[id(sequence)].append(block)

    @torch.inference_mode()
    def _gather_logits(self, rows: TokenRows, num_tokens: int) -> torch.Tensor:
        """(num_tokens, V): every token's logits come from one rank, the others add zero."""
        decoder = self._executor.decoder
        logits = torch.zeros(num_tokens, decoder.vocabulary, dtype=decoder.logits_dtype, device=decoder.device)
        logits[rows.token] = decoder.logits(rows.x)
        if self._group.size > 1:
            self._group.all_reduce(logits, kind="logits")
        return logits
