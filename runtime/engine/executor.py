"""Executor: forward passes of one rank. It owns the decoder, the experts, the K/V cache and the dispatchers.

Shape letters: M tokens of this rank, B sequences of a decode pass, D hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moeplace.placement.modes import Mode
from moeplace.runtime.engine.placed_experts import PlacedExperts, by_home
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import Step, TokenRows
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.hand_over import KvPlaces, give_kv, hand_over, keep_shared
from moeplace.runtime.kv.views import DecodeView, PrefillView
from moeplace.runtime.models.decoder import AttentionView, Decoder
from moeplace.runtime.models.token_attention import rotation_of


class Executor(PlacedExperts[Decoder, KvCache]):
    """What a rank computes. All ranks must call its methods together, with the same sequences.

    Attributes:
        rewinds: whether a position whose K/V exist can be run again.
    """

    rewinds = True

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[RunningSequence], mode: Mode, *, lengths: Sequence[int]) -> TokenRows:
        """Run the first `lengths` tokens of new sequences, at their homes; fills the cache.

        Returns:
            Last hidden states of the tokens whose home is this rank. Tokens are numbered through the sequences in
            the order of their homes (see `by_home`), position by position.
        """
        ordered = by_home(sequences)
        length_of = dict(zip(map(id, sequences), lengths, strict=True))
        tokens_of_rank = self.tokens_of_rank(ordered, [length_of[id(sequence)] for sequence in ordered])
        mine = [sequence for sequence in ordered if sequence.home == self.group.rank]
        own = [length_of[id(sequence)] for sequence in mine]
        ids = [token for s, length in zip(mine, own, strict=True) for token in s.token_ids[:length]]
        first = sum(tokens_of_rank[: self.group.rank])
        view = PrefillView(self.decoder, self.cache, rows=[s.row for s in mine], lengths=own) if mine else None
        rows = self._start(ids, first)
        self._claim((sequence, length_of[id(sequence)]) for sequence in ordered)
        self.note_pass(ordered, [length_of[id(sequence)] for sequence in ordered])
        rows = self._run(mode, rows, lambda token: view, Step(tokens_of_rank))
        for sequence in ordered:
            sequence.cached = length_of[id(sequence)]
            sequence.replicated = sequence.cached if self.group.size == 1 else 0
        return rows

    @torch.inference_mode()
    def decode(self, sequences: Sequence[RunningSequence], mode: Mode) -> TokenRows:
        """Run the first token of each sequence that is not in the cache yet.

        Returns:
            Last hidden states of the tokens that are on this rank at the end; token i belongs to the i-th sequence
            in the order of `by_home`.
        """
        ordered = by_home(sequences)
        self._claim((sequence, sequence.cached + 1) for sequence in ordered)
        coherent = mode == "coherent" and self.group.size > 1
        if coherent:
            self._hand_over(ordered)
        tokens_of_rank = self.tokens_of_rank(ordered, [1] * len(ordered))
        first = sum(tokens_of_rank[: self.group.rank])
        mine = ordered[first : first + tokens_of_rank[self.group.rank]]
        step = Step(tokens_of_rank, KvLedger() if coherent else None)
        make_view = self._decode_views(ordered, step)
        rows = self._start([sequence.token_ids[sequence.cached] for sequence in mine], first)
        self.note_pass(ordered, [1] * len(ordered))
        rows = self._run(mode, rows, make_view, step)
        if step.ledger is not None:
            rows_B, positions_B = [s.row for s in ordered], [s.cached for s in ordered]
            places = KvPlaces.of(rows_B, positions_B, self.decoder.device)
            keep_shared(self.cache, self.group, places, step.ledger)
        for sequence in ordered:
            sequence.cached += 1
            if coherent or self.group.size == 1:
                sequence.replicated = sequence.cached
        return rows

    def _claim(self, ends: Iterable[tuple[RunningSequence, int]]) -> None:
        """Let rows of the cache on this rank be of use to sequences, up to positions."""
        for sequence, end in ends:
            if self.cache.replicated or sequence.home == self.group.rank:
                self.cache.claim(sequence.row, end)

    def _start(self, ids: list[int], first: int) -> TokenRows:
        device = self.decoder.device
        x = self.decoder.embed(torch.tensor(ids, dtype=torch.int64, device=device))
        return TokenRows(x, torch.arange(first, first + len(ids), device=device))

    def _run(
        self, mode: Mode, rows: TokenRows, make_view: Callable[[torch.Tensor], AttentionView | None], step: Step
    ) -> TokenRows:
        """All decoder layers; the tokens of this rank may change at every MoE layer."""
        decoder, dispatcher = self.decoder, self.dispatcher(mode)
        view = make_view(rows.token)
        for layer in range(decoder.num_layers):
            if view is not None:
                rows = TokenRows(decoder.attend(layer, rows.x, view), rows.token)
            elif step.ledger is not None:
                step.ledger.add(layer, rows.token, rows.x.new_empty(0, self.cache.row_width))
            moe_layer = decoder.moe_index.get(layer)
            if moe_layer is None:
                if len(rows):
                    rows = TokenRows(decoder.feed_forward(layer, rows.x), rows.token)
                continue
            moved = dispatcher.forward(moe_layer, decoder.blocks[moe_layer], rows, step)
            if moved.token is not rows.token:
                view = make_view(moved.token)
            rows = moved
        self.group.counters.steps += 1
        return rows

    def _decode_views(
        self, ordered: Sequence[RunningSequence], step: Step
    ) -> Callable[[torch.Tensor], AttentionView | None]:
        device = self.decoder.device
        positions = [sequence.cached for sequence in ordered]
        row_B = torch.tensor([sequence.row for sequence in ordered], device=device)
        position_B = torch.tensor(positions, device=device)
        embeddings = self.decoder.position_embeddings(position_B[:, None])
        rotation = rotation_of(embeddings) if self.decoder.is_quick else None
        alone = self.group.size == 1  # then all tokens are here, in their order, in every layer
        longest, even = max(positions) + 1, min(positions) == max(positions)

        def make_view(token: torch.Tensor) -> AttentionView | None:
            if not len(token):
                return None
            return DecodeView(
                self.cache,
                row=row_B if alone else row_B[token],
                position=position_B if alone else position_B[token],
                longest=longest,
                even=even,
                position_embeddings=embeddings if alone else _pick(embeddings, token),
                rotation=rotation if alone or rotation is None else _pick(rotation, token),
                token=token,
                ledger=step.ledger,
                all_layers=step.ledger is None,
            )

        return make_view

    def _hand_over(self, ordered: Sequence[RunningSequence]) -> None:
        """Give K/V that exist at home only to all ranks: once after a prefill, or after passes in another mode."""
        pairs = [(s, position) for s in ordered for position in range(s.replicated, s.cached)]
        if pairs:
            device = self.decoder.device
            places = KvPlaces.of([s.row for s, _ in pairs], [position for _, position in pairs], device)
            hand_over(self.cache, self.group, places, torch.tensor([s.home for s, _ in pairs], device=device))

    def give_kv(
        self, sequences: Sequence[RunningSequence], replicated: Sequence[int], receivers: Sequence[int]
    ) -> None:
        """Give K/V that all other ranks have to some ranks that have none: each home sends those of its sequences.

        Args:
            sequences: all that run.
            replicated: of each, the first positions to give.
            receivers: who gets them.
        """
        pairs: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self.group.size)]  # by home
        if self.group.rank in receivers:
            self._claim(zip(sequences, replicated, strict=True))
        for sequence, count in zip(sequences, replicated, strict=True):
            rows, positions = pairs[sequence.home]
            rows += [sequence.row] * count
            positions += range(count)
        places_R = [KvPlaces.of(rows, positions, self.decoder.device) for rows, positions in pairs]
        give_kv(self.cache, self.group, places_R, receivers)


def _pick(embeddings: Any, token: torch.Tensor) -> Any:
    """Rows of position embeddings: a tensor, or a pair of tensors."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings[token]
    return tuple(part[token] for part in embeddings)
