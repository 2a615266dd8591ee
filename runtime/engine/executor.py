"""Executor: forward passes of one rank. It owns the decoder, the experts, the K/V cache and the dispatchers.

Shape letters: M tokens of this rank, B sequences with one token each, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.batch import Batch, BatchPart
from moeplace.runtime.engine.coherent_passes import CoherentPasses
from moeplace.runtime.engine.placed_experts import PlacedExperts
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import Step, TokenDispatcher, TokenRows
from moeplace.runtime.exchange.fixed.step import FixedShapes
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.hand_over import KvPlaces, give_kv, hand_over
from moeplace.runtime.kv.views import DecodeView, PromptView, embed_positions
from moeplace.runtime.models.decoder import AttentionView, Decoder
from moeplace.runtime.models.token_attention import rotation_of


class Executor(PlacedExperts[Decoder, KvCache]):
    """What a rank computes. All ranks must call its methods together, with the same sequences.

    Attributes:
        rewinds: whether a position whose K/V exist can be run again.
    """

    rewinds = True

    def __init__(
        self,
        decoder: Decoder,
        experts: ExpertStore,
        cache: KvCache,
        group: RankGroup,
        placement: Placement,
        fixed_shapes: bool = False,
        **options: Any,
    ) -> None:
        """`fixed_shapes`: whether single tokens run in fixed shapes where they can; see `PlacedExperts`."""
        super().__init__(decoder, experts, cache, group, placement, **options)
        self._fixed_shapes_wanted = fixed_shapes
        self.look_ahead_with(decoder.blocks)
        self._coherent = CoherentPasses(decoder, cache, group, self._feed_forward)

    @torch.inference_mode()
    def run(self, batch: Batch, mode: Mode, *, share: bool = False) -> TokenRows:
        """Run the tokens of a batch, behind what the cache has of their sequences.

        Args:
            mode: coherent runs single tokens only, of a group of several ranks.
            share: give K/V of former passes that are at home only to all ranks first, because a coherent pass is to
                follow; that costs a collective. Otherwise such a pass gives all of them.

        Returns:
            Last hidden states of the tokens that are on this rank at the end; `token` are numbers in the batch.
        """
        coherent = mode == "coherent" and self.group.size > 1
        assert batch.runs_single_tokens or not coherent, "K/V of a pass's earlier tokens are where those were"
        if not coherent or batch.trims:
            self.settle()  # what is on its way would be written into a row that has been given back
        if coherent or share:
            self._hand_over(batch.sequences)
        for home, trim in batch.trims:
            if self.cache.replicated or home == self.group.rank:
                self.cache.trim(trim.row, trim.end)
        self._take_prefixes(batch)
        tokens_of_rank = batch.tokens_of_rank(self.group.size)
        self._claim(batch)
        self.note_pass(batch)
        parts = list(batch.parts_on(self.group.rank))
        rows = self._start(parts, first=sum(tokens_of_rank[: self.group.rank]))
        step, shapes = Step(tokens_of_rank), self._shapes_for(mode, batch)
        if not coherent:
            rows = self._run(mode, rows, step, parts, shapes)
        elif shapes is None:
            rows = self._coherent.run(self.dispatcher(mode), rows, step, batch.sequences)
        else:
            rows = self._coherent.run_in_fixed_shapes(shapes, rows, step, batch.sequences)
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            if share:
                sequence.replicated = sequence.cached
            sequence.cached += length
            if coherent or self.group.size == 1:
                sequence.replicated = sequence.cached
        return rows

    def settle(self) -> None:
        """Wait for K/V of the last coherent step that are on their way: before anything but another such step.

        Raises:
            PeerLostError: a rank is gone.
        """
        self._coherent.settle()

    def forget_unsettled(self) -> None:
        """A rank is gone, and K/V on their way with it: what the last coherent step cached is not whole."""
        self._coherent.forget_unsettled()

    def regroup(self, group: RankGroup, placement: Placement, *, version: int) -> None:
        """See `PlacedExperts.regroup`."""
        super().regroup(group, placement, version=version)
        self._coherent = CoherentPasses(self.decoder, self.cache, group, self._feed_forward)

    def _take_prefixes(self, batch: Batch) -> None:
        """Copy what sequences take over from rows, none of which a sequence of the batch has taken."""
        for sequence in batch.sequences:
            if sequence.prefix is None:
                continue
            if self.cache.replicated or sequence.home == self.group.rank:
                self.cache.copy(sequence.prefix.row, sequence.row, sequence.prefix.positions)
            sequence.cached, sequence.prefix = sequence.prefix.positions, None
            sequence.replicated = sequence.cached if self.cache.replicated or self.group.size == 1 else 0
            if sequence.home == self.group.rank:
                self.group.counters.tokens_reused += sequence.cached

    def _claim(self, batch: Batch) -> None:
        """Let rows of the cache on this rank be of use to the tokens of a batch."""
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            if self.cache.replicated or sequence.home == self.group.rank:
                self.cache.claim(sequence.row, sequence.cached + length)

    def _start(self, parts: Sequence[BatchPart], *, first: int) -> TokenRows:
        """Tokens of this rank before the first layer, numbered from `first` on."""
        ids = [
            token
            for part in parts
            for sequence, length in zip(part.sequences, part.lengths, strict=True)
            for token in sequence.token_ids[sequence.cached : sequence.cached + length]
        ]
        device = self.decoder.device
        x = self.decoder.embed(torch.tensor(ids, dtype=torch.int64, device=device))
        return TokenRows(x, torch.arange(first, first + len(ids), device=device))

    def _shapes_for(self, mode: Mode, batch: Batch) -> FixedShapes | None:
        """What runs a pass in fixed shapes, if it is to: its shapes follow from how many sequences there are."""
        return self.fixed_shapes(mode) if self._fixed_shapes_wanted and batch.runs_single_tokens else None

    def _run(
        self, mode: Mode, rows: TokenRows, step: Step, parts: Sequence[BatchPart], shapes: FixedShapes | None
    ) -> TokenRows:
        """All decoder layers; the tokens of this rank, which `parts` are, stay."""
        if shapes is None:
            return self._run_with(self.dispatcher(mode), rows, step, parts)
        return shapes.run(lambda dispatcher: self._run_with(dispatcher, rows, step, parts))

    def _run_with(
        self, dispatcher: TokenDispatcher, rows: TokenRows, step: Step, parts: Sequence[BatchPart]
    ) -> TokenRows:
        views, sizes = [self._view(part) for part in parts], [part.num_tokens for part in parts]
        for layer in range(self.decoder.num_layers):
            if len(views) == 1:
                rows = replace(rows, x=self.decoder.attend(layer, rows.x, views[0]))
            elif views:
                pieces = zip(rows.x.split(sizes), views, strict=True)
                x = torch.cat([self.decoder.attend(layer, piece, view) for piece, view in pieces])
                rows = replace(rows, x=x)
            rows = self._feed_forward(layer, dispatcher, rows, step)
        self.group.counters.steps += 1
        return rows

    def _feed_forward(self, layer: int, dispatcher: TokenDispatcher, rows: TokenRows, step: Step) -> TokenRows:
        """The second half of a decoder layer: experts, or a dense one where there are tokens."""
        moe_layer = self.decoder.moe_index.get(layer)
        if moe_layer is not None:
            return dispatcher.forward(moe_layer, self.decoder.blocks[moe_layer], rows, step)
        return replace(rows, x=self.decoder.feed_forward(layer, rows.x)) if len(rows) else rows

    def _view(self, part: BatchPart) -> AttentionView:
        """What a part of this rank's tokens sees, in all layers."""
        sequences, device = part.sequences, self.decoder.device
        if part.kind != "token":
            return PromptView(
                self.decoder,
                self.cache,
                rows=[sequence.row for sequence in sequences],
                starts=[sequence.cached for sequence in sequences],
                lengths=part.lengths,
                known=max(len(sequence.token_ids) for sequence in sequences),
            )
        positions = [sequence.cached for sequence in sequences]
        position_B = torch.tensor(positions, device=device)
        known = max(len(sequence.token_ids) for sequence in sequences)
        embeddings = embed_positions(self.decoder, position_B[:, None], known=known, longest=max(positions) + 1)
        return DecodeView(
            self.cache,
            row=torch.tensor([sequence.row for sequence in sequences], device=device),
            position=position_B,
            longest=max(positions) + 1,
            even=min(positions) == max(positions),
            position_embeddings=embeddings,
            rotation=rotation_of(embeddings) if self.decoder.is_quick else None,
            all_layers=True,
        )

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
        self.settle()
        pairs: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self.group.size)]  # by home
        if self.group.rank in receivers:
            for sequence, count in zip(sequences, replicated, strict=True):
                self.cache.claim(sequence.row, count)
        for sequence, count in zip(sequences, replicated, strict=True):
            rows, positions = pairs[sequence.home]
            rows += [sequence.row] * count
            positions += range(count)
        places_R = [KvPlaces.of(rows, positions, self.decoder.device) for rows, positions in pairs]
        give_kv(self.cache, self.group, places_R, receivers)
