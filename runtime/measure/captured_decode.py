"""CapturedDecode: decode passes of one rank whose shapes never change, so that a CUDA graph holds a whole pass.

    ids, rows, positions --copied into--> kept tensors --[graph: embedding, layers, logits]--> kept logits

A graph is for a number of sequences and for a reach: the attention looks at so many positions, and a mask hides those
that a sequence does not have. Positions beyond the reach need a graph of their own.

What records and replays is a `Recorder`: `CudaRecorder` makes graphs, `EagerRecorder` runs the pass each time on the
same kept tensors, on any device, which tells whether the pass depends on anything else.

Shape letters: B sequences, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.exchange.dispatcher import Step, TokenRows
from moeplace.runtime.exchange.fixed.step import FixedDispatcher, StepNotes
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.views import DecodeView
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.token_attention import rotation_of

Run = Callable[[], torch.Tensor]
_WARM_UPS = 3
"""Passes before a capture: what is made on first use is made then."""


class Recorder(Protocol):
    """Makes something quick of a function without arguments that always does the same on the same tensors."""

    def record(self, run: Run) -> Run:
        """What does the same, and returns the same tensor each time."""


class EagerRecorder:
    """Runs it."""

    def record(self, run: Run) -> Run:
        """See `Recorder`."""
        kept = run()

        def replay() -> torch.Tensor:
            return kept.copy_(run())

        return replay


class CudaRecorder:
    """A CUDA graph."""

    def record(self, run: Run) -> Run:
        """See `Recorder`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may ask for events
            kept = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return kept

        return replay


class CapturedDecode:
    """See the module.

    Attributes:
        sequences: B.
        reach: positions that attention looks at.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        dispatcher: FixedDispatcher,
        *,
        sequences: int,
        reach: int,
        recorder: Recorder,
    ) -> None:
        """Record a pass; it writes to row 0 and position 0 of the cache, which nobody may use yet.

        Args:
            dispatcher: of one rank; what it notes of these passes is not kept.

        Raises:
            InputError: the cache has fewer positions than `reach`.
        """
        if not 1 <= reach <= cache.positions:
            raise InputError(f"reach ({reach}) must lie in 1..{cache.positions}, the positions of the cache")
        self.sequences, self.reach = sequences, reach
        self._decoder, self._cache, self._dispatcher = decoder, cache, dispatcher
        self._inputs_3B = torch.zeros(3, sequences, dtype=torch.int64, device=decoder.device)
        self._token_B = torch.arange(sequences, device=decoder.device)
        self._replay = recorder.record(self._run)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of one token per sequence; the next step writes over them.

        Args:
            ids: (B,) int64 tokens.
            rows: (B,) int64 their rows of the cache.
            positions: (B,) int64 their positions, less than `reach`.
        """
        self._inputs_3B.copy_(torch.stack([ids, rows, positions]))
        return self._replay()

    def _run(self) -> torch.Tensor:
        decoder, self._dispatcher.notes = self._decoder, StepNotes()
        ids_B, row_B, position_B = self._inputs_3B.unbind(0)
        embeddings = decoder.position_embeddings(position_B[:, None])
        view = DecodeView(
            self._cache,
            row=row_B.clone(),  # of a kept tensor: nothing that was seen of it may be kept
            position=position_B,
            longest=self.reach,
            even=False,
            position_embeddings=embeddings,
            rotation=rotation_of(embeddings) if decoder.is_quick else None,
        )
        rows, step = TokenRows(decoder.embed(ids_B), self._token_B), Step((self.sequences,))
        for layer in range(decoder.num_layers):
            rows = TokenRows(decoder.attend(layer, rows.x, view), rows.token)
            moe_layer = decoder.moe_index.get(layer)
            if moe_layer is None:
                rows = TokenRows(decoder.feed_forward(layer, rows.x), rows.token)
            else:
                rows = self._dispatcher.forward(moe_layer, decoder.blocks[moe_layer], rows, step)
        return decoder.logits(rows.x)
