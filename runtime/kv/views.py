"""What attention modules see of a K/V cache in one pass: stretches of prompts, or one new token per sequence.

Shape letters: B sequences, Q queries per sequence, M tokens of this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.cache import KvCache, flatten_kv
from moeplace.runtime.kv.row_reading import stretches_of
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.token_attention import Rotation, SeenKv


class PromptView:
    """Several tokens of each of some sequences, in their order: prompts from position 0, or from where they stopped.

    Args:
        rows: cache row of each sequence.
        starts: positions of each that the cache has; all 0, or none of them.
        lengths: tokens of each sequence; tokens of a pass are in this order.
        known: tokens of the longest sequence, those of later passes included.
    """

    rotation = None

    def __init__(
        self, decoder: Decoder, cache: KvCache, *, rows: list[int], starts: list[int], lengths: list[int], known: int
    ) -> None:
        self._cache, self._rows, self._starts, self._lengths = cache, rows, starts, lengths
        self._longest, self._even = max(lengths), min(lengths) == max(lengths)
        self._reach = max(start + length for start, length in zip(starts, lengths, strict=True))
        self._is_new = not any(starts)
        device = decoder.device
        index = torch.arange(self._longest, device=device)
        length_B, start_B, self._row_B = torch.tensor([lengths, starts, rows], device=device)
        length_B1, start_B1 = length_B[:, None], start_B[:, None]
        self._valid = index < length_B1  # (B, Q)
        # Padding stands at a position of its own sequence: what lies beyond its end may have no embedding.
        self._position = index[None, :] if self._is_new else start_B1 + torch.minimum(index, length_B1 - 1)
        self.position_embeddings = embed_positions(decoder, self._position, known=known, longest=self._reach)
        self._masks: dict[int | None, torch.Tensor] = {}

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionView`; short sequences are padded behind, where causality hides the padding."""
        if self._even:
            return x.view(len(self._rows), self._longest, -1)
        folded = x.new_zeros(*self._valid.shape, x.shape[1])
        folded[self._valid] = x
        return folded

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionView`."""
        return x.flatten(0, 1) if self._even else x[self._valid]

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        """See `AttentionView`."""
        if self._is_new and additive is None and (window is None or window >= self._longest):
            return None  # plain causality, which the attention function knows by itself
        if window not in self._masks:
            behind = self._position[:, :, None] - torch.arange(self._reach, device=self._valid.device)
            seen = (behind >= 0) & (behind < (window or self._reach))  # (B or 1, Q, keys)
            self._masks[window] = _as_mask(seen[:, None], additive)
        return self._masks[window]

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        """See `AttentionView`; prompts are no single tokens."""
        raise AssertionError("without a rotation nothing is stored so")

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """See `AttentionView`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for index, (row, start, length) in enumerate(zip(self._rows, self._starts, self._lengths, strict=True)):
            keys[row, :, start : start + length] = key[index, :, :length]
            values[row, :, start : start + length] = value[index, :, :length]
        if self._is_new:
            return key, value
        if len(self._rows) == 1:  # then it is a view
            row = self._rows[0]
            return keys[row : row + 1, :, : self._reach], values[row : row + 1, :, : self._reach]
        return self._cache.gather(layer, self._row_B, self._reach)


class DecodeView:
    """One new token per sequence.

    Args:
        row: (M,) cache row of each token's sequence.
        position: (M,) its position.
        longest: an upper bound of the positions, plus one.
        even: whether all positions equal longest - 1.
        rotation: of the positions, for a decoder that is quick; None = modules are used.
        token: (M,) names of the tokens, noted in `ledger` with their new K/V, where there is one.
        all_layers: whether all layers of the pass see this view; then what depends on the rows alone is made once.
    """

    def __init__(
        self,
        cache: KvCache,
        *,
        row: torch.Tensor,
        position: torch.Tensor,
        longest: int,
        even: bool,
        position_embeddings: Any,
        rotation: Rotation | None = None,
        token: torch.Tensor | None = None,
        ledger: KvLedger | None = None,
        all_layers: bool = False,
    ) -> None:
        self._cache, self._row, self._position = cache, row, position
        self._longest, self._even = longest, even
        self._token, self._ledger = token, ledger
        self.position_embeddings, self.rotation = position_embeddings, rotation
        reach_bytes = longest * cache.row_width * cache.all_keys.element_size()
        self._stretches = stretches_of(row, reach_bytes)
        self._slice = self._stretches[0] if len(self._stretches) == 1 else None
        self._masks: dict[int | None, torch.Tensor] = {}
        self._seen: list[tuple[torch.Tensor, ...]] | None = None
        self._places: list[tuple[torch.Tensor, ...]] = []
        if all_layers and self._slice is not None:
            slabs = (cache.all_keys[:, self._slice], cache.all_values[:, self._slice])
            self._seen = [slab[:, :, :, :longest].unbind(0) for slab in slabs]
            if even:
                self._places = [slab[:, :, :, longest - 1].unbind(0) for slab in slabs]

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionView`."""
        return x.unsqueeze(1)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionView`."""
        return x.squeeze(1)

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        """See `AttentionView`."""
        if self._even and (window is None or window >= self._longest):
            return None
        if window not in self._masks:
            behind = self._position[:, None] - torch.arange(self._longest, device=self._position.device)
            seen = (behind >= 0) & (behind < (window or self._longest))
            self._masks[window] = _as_mask(seen[:, None, None], additive)
        return self._masks[window]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """See `AttentionView`."""
        self._keep(layer, key[:, :, 0], value[:, :, 0])
        return self._read(layer)[0] if self._slice is not None else self._cache.gather(layer, self._row, self._longest)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        """See `AttentionView`."""
        self._keep(layer, key, value)
        return self._read(layer) if self._stretches else [self._cache.gather(layer, self._row, self._longest)]

    def _keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._ledger is not None:
            assert self._token is not None
            self._ledger.add(layer, self._token, flatten_kv(key, value))
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._places:
            for places, new in zip(self._places, (key, value), strict=True):
                places[layer].copy_(new)
        elif self._slice is not None and self._even:
            keys[self._slice, :, self._longest - 1] = key
            values[self._slice, :, self._longest - 1] = value
        else:
            keys[self._row, :, self._position] = key
            values[self._row, :, self._position] = value

    def _read(self, layer: int) -> Sequence[SeenKv]:
        """Views of the cache."""
        if self._seen is not None:
            return [(self._seen[0][layer], self._seen[1][layer])]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        return [(keys[rows, :, : self._longest], values[rows, :, : self._longest]) for rows in self._stretches]


def embed_positions(decoder: Decoder, position: torch.Tensor, *, known: int, longest: int) -> Any:
    """What attention wants to know of positions (B, Q), the greatest of which is `longest` - 1.

    A rotation may depend on how long the sequence is (LongRoPE has one for prompts beyond a length): the tokens of a
    chunk are turned as in a pass over all that are `known`.
    """
    if known <= longest:
        return decoder.position_embeddings(position)
    last = torch.full_like(position[:, :1], known - 1)
    embeddings = decoder.position_embeddings(torch.cat([position, last], dim=1))
    if isinstance(embeddings, torch.Tensor):
        return embeddings[:, :-1]
    return tuple(part[:, :-1] for part in embeddings)


@torch.inference_mode()
def rotates_by_length(decoder: Decoder) -> bool:
    """Whether what attention knows of a position depends on how long the sequence is."""
    first = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
    alone = decoder.position_embeddings(first + 1)
    beside = embed_positions(decoder, first + 1, known=decoder.max_positions, longest=2)
    pairs = [(alone, beside)] if isinstance(alone, torch.Tensor) else list(zip(alone, beside, strict=True))
    return not all(torch.equal(one, other) for one, other in pairs)


def _as_mask(seen: torch.Tensor, additive: torch.dtype | None) -> torch.Tensor:
    """A boolean mask, or zero and the lowest number for attention functions that add it."""
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, torch.finfo(additive).min)
