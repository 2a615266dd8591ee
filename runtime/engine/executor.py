"""Executor: forward passes of one rank. It owns the decoder, the experts, the K/V cache and the dispatchers.

Shape letters: M tokens of this rank, B sequences with one token each, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.batch import Batch, BatchPart
from moeplace.runtime.engine.placed_experts import PlacedExperts
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import Step, TokenDispatcher, TokenRows
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.exchange import SharedKv
from moeplace.runtime.kv.hand_over import KvPlaces, give_kv, hand_over, store_shared
from moeplace.runtime.kv.stream import KvStream, default_pieces
from moeplace.runtime.kv.views import DecodeView, PromptView, embed_positions
from moeplace.runtime.models.decoder import AttentionView, Decoder
from moeplace.runtime.models.token_attention import Rotation, rotation_of


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
        self._stream: KvStream[KvPlaces] | None = None
        self._unsettled: Sequence[RunningSequence] = ()  # whose last K/V are on their way

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
        if coherent:
            rows = self._run_coherent(rows, Step(tokens_of_rank), batch.sequences)
        else:
            rows = self._run(mode, rows, Step(tokens_of_rank), parts, in_fixed_shapes=self._suits_fixed_shapes(batch))
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            if share:
                sequence.replicated = sequence.cached
            sequence.cached += length
            if coherent or self.group.size == 1:
                sequence.replicated = sequence.cached
        self._unsettled = batch.sequences if coherent else ()
        return rows

    def settle(self) -> None:
        """Wait for K/V of the last coherent step that are on their way: before anything but another such step.

        Raises:
            PeerLostError: a rank is gone.
        """
        if self._stream is not None:
            self._stream.drain()
        self._unsettled = []

    def forget_unsettled(self) -> None:
        """A rank is gone, and K/V on their way with it: what the last coherent step cached is not whole."""
        for sequence in self._unsettled:
            sequence.cached -= 1
            sequence.replicated = min(sequence.replicated, sequence.cached)
        self._unsettled, self._stream = [], None

    def regroup(self, group: RankGroup, placement: Placement, *, version: int) -> None:
        """See `PlacedExperts.regroup`."""
        self._stream, self._unsettled = None, []
        super().regroup(group, placement, version=version)

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

    def _suits_fixed_shapes(self, batch: Batch) -> bool:
        """Whether the shapes of a pass follow from how many sequences there are: then so they do in many passes."""
        return self._fixed_shapes_wanted and batch.runs_single_tokens

    def _run(
        self, mode: Mode, rows: TokenRows, step: Step, parts: Sequence[BatchPart], *, in_fixed_shapes: bool
    ) -> TokenRows:
        """All decoder layers; the tokens of this rank, which `parts` are, stay."""
        shapes = self.fixed_shapes(mode) if in_fixed_shapes else None
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

    def _run_coherent(self, rows: TokenRows, step: Step, ordered: Sequence[RunningSequence]) -> TokenRows:
        """All decoder layers; tokens may change ranks at every MoE layer, and their K/V travel meanwhile."""
        dispatcher, stream, make_view = self.dispatcher("coherent"), self._kv_stream(), self._moving_views(ordered)
        places = KvPlaces.of([s.row for s in ordered], [s.cached for s in ordered], self.decoder.device)
        ledger: KvLedger | None = None
        view: AttentionView | None = None
        for layer in range(self.decoder.num_layers):
            before, ledger = ledger, stream.ledger(places, layer, ledger)
            if ledger is not before:
                if stream.holds_only(places):
                    self._unsettled = []  # the step before has arrived
                view = make_view(rows.token, ledger)
                step = replace(step, ledger=ledger)
            if view is not None:
                rows = replace(rows, x=self.decoder.attend(layer, rows.x, view))
            else:
                ledger.add(layer, rows.token, rows.x.new_empty(0, self.cache.row_width))
            moved = self._feed_forward(layer, dispatcher, rows, step)
            if moved.token is not rows.token:
                view = make_view(moved.token, ledger)
            rows = moved
        assert ledger is not None
        stream.end_step(places, ledger)
        self.group.counters.steps += 1
        return rows

    def _feed_forward(self, layer: int, dispatcher: TokenDispatcher, rows: TokenRows, step: Step) -> TokenRows:
        """The second half of a decoder layer: experts, or a dense one where there are tokens."""
        moe_layer = self.decoder.moe_index.get(layer)
        if moe_layer is not None:
            return dispatcher.forward(moe_layer, self.decoder.blocks[moe_layer], rows, step)
        return replace(rows, x=self.decoder.feed_forward(layer, rows.x)) if len(rows) else rows

    def _kv_stream(self) -> KvStream[KvPlaces]:
        """Of the group in force; all ranks make it in the same step."""
        if self._stream is None:
            exchanging = sorted(self.decoder.moe_index)
            pieces = default_pieces(len(exchanging))
            layers = self.decoder.num_layers
            self._stream = KvStream(self.group, exchanging, num_layers=layers, pieces=pieces, keep=self._keep)
        return self._stream

    def _keep(self, places: KvPlaces, shared: SharedKv) -> None:
        """Store K/V of others, of the tokens of a step at their places."""
        store_shared(self.cache, places, shared)

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

    def _moving_views(
        self, ordered: Sequence[RunningSequence]
    ) -> Callable[[torch.Tensor, KvLedger], AttentionView | None]:
        """What makes the view of those of the tokens that are here, with the ledger in which their K/V are noted."""
        device = self.decoder.device
        positions = [sequence.cached for sequence in ordered]
        place_B2 = torch.tensor([(sequence.row, sequence.cached) for sequence in ordered], device=device)
        embeddings = self.decoder.position_embeddings(place_B2[:, 1:])
        rotation = rotation_of(embeddings) if self.decoder.is_quick else None
        longest, even = max(positions) + 1, min(positions) == max(positions)
        joined = None if rotation is None else torch.cat([*embeddings, rotation[1]], dim=-1)  # one look-up, not four

        def pick(token: torch.Tensor) -> tuple[Any, Rotation | None]:
            if joined is None:
                return _pick(embeddings, token), None
            cosine, sine, signed_sine = joined[token].chunk(3, dim=-1)
            return (cosine, sine), (cosine, signed_sine)

        def make_view(token: torch.Tensor, ledger: KvLedger) -> AttentionView | None:
            if not len(token):
                return None
            row, position = place_B2[token].unbind(1)
            position_embeddings, rotation = pick(token)
            return DecodeView(
                self.cache,
                row=row,
                position=position,
                longest=longest,
                even=even,
                position_embeddings=position_embeddings,
                rotation=rotation,
                token=token,
                ledger=ledger,
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


def _pick(embeddings: Any, token: torch.Tensor) -> Any:
    """Rows of position embeddings: a tensor, or a pair of tensors."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings[token]
    return tuple(part[token] for part in embeddings)
