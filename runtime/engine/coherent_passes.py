"""CoherentPasses: decode passes in which tokens change ranks, and their K/V follow to all ranks.

Two forms. The exact one sends K/V in pieces beside the layers (`KvStream`): row counts travel in the headers of the
layers' exchanges. In fixed shapes the host knows no counts. There K/V are noted for every place that a row may have,
and when the layers are done one sum over the ranks brings them together: each token has its K/V of a layer on one
rank, the others add zeros, bit by bit as whole numbers, so that nothing is rounded. That takes twice the bytes of the
exact form, and does not travel beside the layers. Places of nobody write to a row of the cache that no sequence has.

Shape letters: B sequences with one token each, L decoder layers, c K/V elements per token and layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import Step, TokenDispatcher, TokenRows
from moeplace.runtime.exchange.fixed.step import FixedShapes
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.exchange import SharedKv
from moeplace.runtime.kv.hand_over import KvPlaces, store_shared
from moeplace.runtime.kv.stream import KvStream, default_pieces
from moeplace.runtime.kv.views import DecodeView
from moeplace.runtime.models.decoder import AttentionView, Decoder
from moeplace.runtime.models.token_attention import Rotation, rotation_of

FeedForward = Callable[[int, TokenDispatcher, TokenRows, Step], TokenRows]
"""The second half of a decoder layer, of the rows that are on this rank."""


class CoherentPasses:
    """Those of a group; all ranks call its methods together.

    Attributes:
        unsettled: sequences whose last K/V are on their way.
    """

    def __init__(self, decoder: Decoder, cache: KvCache, group: RankGroup, feed_forward: FeedForward) -> None:
        """`cache` has a row for nobody, where passes are to run in fixed shapes."""
        self._decoder, self._cache, self._group, self._feed_forward = decoder, cache, group, feed_forward
        self._stream: KvStream[KvPlaces] | None = None
        self.unsettled: Sequence[RunningSequence] = ()

    def run(
        self, dispatcher: TokenDispatcher, rows: TokenRows, step: Step, ordered: Sequence[RunningSequence]
    ) -> TokenRows:
        """All decoder layers; tokens may change ranks at every MoE layer, and their K/V travel meanwhile."""
        stream, make_view, places = self._kv_stream(), self._moving_views(ordered), self._places(ordered)
        ledger: KvLedger | None = None
        view: AttentionView | None = None
        for layer in range(self._decoder.num_layers):
            before, ledger = ledger, stream.ledger(places, layer, ledger)
            if ledger is not before:
                if stream.holds_only(places):
                    self.unsettled = ()  # the step before has arrived
                view = make_view(rows.token, ledger)
                step = replace(step, ledger=ledger)
            if view is not None:
                rows = replace(rows, x=self._decoder.attend(layer, rows.x, view))
            else:
                ledger.add(layer, rows.token, rows.x.new_empty(0, self._cache.row_width))
            moved = self._feed_forward(layer, dispatcher, rows, step)
            if moved.token is not rows.token:
                view = make_view(moved.token, ledger)
            rows = moved
        assert ledger is not None
        stream.end_step(places, ledger)
        self._group.counters.steps += 1
        self.unsettled = ordered
        return rows

    def run_in_fixed_shapes(
        self, shapes: FixedShapes, rows: TokenRows, step: Step, ordered: Sequence[RunningSequence]
    ) -> TokenRows:
        """`run` in fixed shapes, with K/V on all ranks at the end; as it is, where there was no room."""
        self.settle()
        ledger = KvLedger()

        def run_layers(dispatcher: TokenDispatcher) -> TokenRows:
            if dispatcher is shapes.exact:
                return self.run(dispatcher, rows, step, ordered)
            return self._run_fixed_layers(dispatcher, rows, step, ordered, ledger)

        found = shapes.run(run_layers)
        if not self.unsettled:  # else it was run again, and K/V are on their way
            self._bring_together(ledger, self._places(ordered))
        return found

    def settle(self) -> None:
        """Wait for K/V of the last pass that are on their way: before anything but another such pass.

        Raises:
            PeerLostError: a rank is gone.
        """
        if self._stream is not None:
            self._stream.drain()
        self.unsettled = ()

    def forget_unsettled(self) -> None:
        """A rank is gone, and K/V on their way with it: what the last pass cached is not whole."""
        for sequence in self.unsettled:
            sequence.cached -= 1
            sequence.replicated = min(sequence.replicated, sequence.cached)
        self.unsettled, self._stream = (), None

    def _run_fixed_layers(
        self,
        dispatcher: TokenDispatcher,
        rows: TokenRows,
        step: Step,
        ordered: Sequence[RunningSequence],
        ledger: KvLedger,
    ) -> TokenRows:
        make_view = self._moving_views(ordered)
        view = make_view(rows.token, ledger)
        for layer in range(self._decoder.num_layers):
            if view is not None:
                rows = replace(rows, x=self._decoder.attend(layer, rows.x, view))
            moved = self._feed_forward(layer, dispatcher, rows, step)
            if moved.token is not rows.token:
                view = make_view(moved.token, ledger)
            rows = moved
        self._group.counters.steps += 1
        return rows

    def _bring_together(self, ledger: KvLedger, places: KvPlaces) -> None:
        """Let all ranks have the K/V of all tokens and layers: one collective."""
        shape = (self._decoder.num_layers, len(places) + 1, self._cache.row_width)
        kv_LBc = torch.zeros(shape, dtype=self._decoder.dtype, device=self._decoder.device)
        for layer, token, rows in zip(ledger.layers, ledger.tokens, ledger.rows, strict=True):
            kv_LBc[layer][token] = rows  # the last one is nobody's
        width = shape[2] * kv_LBc.element_size()
        self._group.all_reduce(kv_LBc.view(torch.uint8 if width % 4 else torch.int32), kind="kv")
        self._cache.write_all_layers(places.row, places.position, kv_LBc[:, :-1])

    def _kv_stream(self) -> KvStream[KvPlaces]:
        """All ranks make it in the same pass."""
        if self._stream is None:
            exchanging = sorted(self._decoder.moe_index)
            pieces, layers = default_pieces(len(exchanging), self._group.num_nodes), self._decoder.num_layers
            self._stream = KvStream(self._group, exchanging, num_layers=layers, pieces=pieces, keep=self._keep)
        return self._stream

    def _keep(self, places: KvPlaces, shared: SharedKv) -> None:
        """Store K/V of others, of the tokens of a step at their places."""
        store_shared(self._cache, places, shared)

    def _places(self, ordered: Sequence[RunningSequence]) -> KvPlaces:
        return KvPlaces.of([s.row for s in ordered], [s.cached for s in ordered], self._decoder.device)

    def _moving_views(
        self, ordered: Sequence[RunningSequence]
    ) -> Callable[[torch.Tensor, KvLedger], AttentionView | None]:
        """What makes the view of those of the tokens that are here, with the ledger in which their K/V are noted.

        The token -1 is nobody's: its place is the last one, in the row for nobody.
        """
        decoder = self._decoder
        positions = [sequence.cached for sequence in ordered]
        longest, even = max(positions) + 1, min(positions) == max(positions)
        places = [*((sequence.row, sequence.cached) for sequence in ordered), (self._cache.row_of_nobody, longest - 1)]
        place_B2 = torch.tensor(places, device=decoder.device)
        embeddings = decoder.position_embeddings(place_B2[:, 1:])
        rotation = rotation_of(embeddings) if decoder.is_quick else None
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
                self._cache,
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


def _pick(embeddings: Any, token: torch.Tensor) -> Any:
    """Rows of position embeddings: a tensor, or a pair of tensors."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings[token]
    return tuple(part[token] for part in embeddings)
