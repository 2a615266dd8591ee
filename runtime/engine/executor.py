"""Executor: forward passes of one rank. It owns the decoder, the experts, the K/V cache and the dispatchers.

Shape letters: M tokens of this rank, B sequences of a decode pass, D hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.placed_experts import PlacedExperts, by_home
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import Step, TokenRows
from moeplace.runtime.exchange.factory import Dispatcher
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.exchange import SharedKv
from moeplace.runtime.kv.hand_over import KvPlaces, give_kv, hand_over, store_shared
from moeplace.runtime.kv.stream import KvStream, default_pieces
from moeplace.runtime.kv.views import DecodeView, PrefillView
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
        **options: Any,
    ) -> None:
        """See `PlacedExperts`."""
        super().__init__(decoder, experts, cache, group, placement, **options)
        self.look_ahead_with(decoder.blocks)
        self._stream: KvStream[KvPlaces] | None = None
        self._unsettled: Sequence[RunningSequence] = ()  # whose last K/V are on their way

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[RunningSequence], mode: Mode, *, lengths: Sequence[int]) -> TokenRows:
        """Run the first `lengths` tokens of new sequences, at their homes; fills the cache.

        Returns:
            Last hidden states of the tokens whose home is this rank. Tokens are numbered through the sequences in
            the order of their homes (see `by_home`), position by position.
        """
        self.settle()
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
        rows = self._run(mode, rows, lambda token, ledger: view, Step(tokens_of_rank))
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
        coherent = mode == "coherent" and self.group.size > 1
        if coherent:
            self._hand_over(ordered)
        else:
            self.settle()
        tokens_of_rank = self.tokens_of_rank(ordered, [1] * len(ordered))
        first = sum(tokens_of_rank[: self.group.rank])
        mine = ordered[first : first + tokens_of_rank[self.group.rank]]
        self._claim((sequence, sequence.cached + 1) for sequence in ordered)
        rows = self._start([sequence.token_ids[sequence.cached] for sequence in mine], first)
        self.note_pass(ordered, [1] * len(ordered))
        make_view = self._decode_views(ordered)
        step = Step(tokens_of_rank)
        rows = (
            self._run_coherent(rows, make_view, step, ordered) if coherent else self._run(mode, rows, make_view, step)
        )
        for sequence in ordered:
            sequence.cached += 1
            if coherent or self.group.size == 1:
                sequence.replicated = sequence.cached
        self._unsettled = ordered if coherent else []
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
        self, mode: Mode, rows: TokenRows, make_view: Callable[..., AttentionView | None], step: Step
    ) -> TokenRows:
        """All decoder layers; the tokens of this rank stay."""
        dispatcher, view = self.dispatcher(mode), make_view(rows.token, None)
        for layer in range(self.decoder.num_layers):
            if view is not None:
                rows = TokenRows(self.decoder.attend(layer, rows.x, view), rows.token)
            rows = self._feed_forward(layer, dispatcher, rows, step)
        self.group.counters.steps += 1
        return rows

    def _run_coherent(
        self,
        rows: TokenRows,
        make_view: Callable[..., AttentionView | None],
        step: Step,
        ordered: Sequence[RunningSequence],
    ) -> TokenRows:
        """All decoder layers; tokens may change ranks at every MoE layer, and their K/V travel meanwhile."""
        dispatcher, stream = self.dispatcher("coherent"), self._kv_stream()
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
                rows = TokenRows(self.decoder.attend(layer, rows.x, view), rows.token)
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

    def _feed_forward(self, layer: int, dispatcher: Dispatcher, rows: TokenRows, step: Step) -> TokenRows:
        """The second half of a decoder layer: experts, or a dense one where there are tokens."""
        moe_layer = self.decoder.moe_index.get(layer)
        if moe_layer is not None:
            return dispatcher.forward(moe_layer, self.decoder.blocks[moe_layer], rows, step)
        return TokenRows(self.decoder.feed_forward(layer, rows.x), rows.token) if len(rows) else rows

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

    def _decode_views(self, ordered: Sequence[RunningSequence]) -> Callable[..., AttentionView | None]:
        """What makes the view of some of the tokens, with the ledger in which their K/V are noted."""
        device = self.decoder.device
        positions = [sequence.cached for sequence in ordered]
        row_B = torch.tensor([sequence.row for sequence in ordered], device=device)
        position_B = torch.tensor(positions, device=device)
        embeddings = self.decoder.position_embeddings(position_B[:, None])
        rotation = rotation_of(embeddings) if self.decoder.is_quick else None
        alone = self.group.size == 1  # then all tokens are here, in their order, in every layer
        longest, even = max(positions) + 1, min(positions) == max(positions)

        def make_view(token: torch.Tensor, ledger: KvLedger | None) -> AttentionView | None:
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
                ledger=ledger,
                all_layers=ledger is None,
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
