"""KvCache: keys and values of sequences, one row per sequence and a fixed number of positions: memory is bounded.

The views are what attention modules see of it in one pass.

Shape letters: B sequences, Q queries per sequence, M tokens of this rank, c K/V elements per token and layer.
"""

from typing import Any

import torch

from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.models.decoder import Decoder


class KvCache:
    """Rows of keys and values.

    Attributes:
        keys: per decoder layer (rows, heads, positions, key dim).
        values: per decoder layer (rows, heads, positions, value dim).
        row_width: c.
    """

    def __init__(self, decoder: Decoder, *, rows: int, positions: int) -> None:
        key_shape, value_shape = _probe_shapes(decoder)

        def slab(shape: tuple[int, int]) -> torch.Tensor:
            # Zeros, because masked positions are multiplied by zero and must not be NaN. On a CPU an untouched page
            # takes no memory, so an idle row costs nothing there.
            return torch.zeros(rows, shape[0], positions, shape[1], dtype=decoder.dtype, device=decoder.device)

        self.keys = [slab(key_shape) for _ in range(decoder.num_layers)]
        self.values = [slab(value_shape) for _ in range(decoder.num_layers)]
        self.rows, self.positions = rows, positions
        self._key_shape, self._value_shape = key_shape, value_shape
        self._key_width = key_shape[0] * key_shape[1]
        self.row_width = self._key_width + value_shape[0] * value_shape[1]

    def write(self, layer: int, row: torch.Tensor, position: torch.Tensor, kv: torch.Tensor) -> None:
        """Store K/V (n, c) at rows (n,) and positions (n,) of a decoder layer."""
        self.keys[layer][row, :, position] = kv[:, : self._key_width].unflatten(1, self._key_shape)
        self.values[layer][row, :, position] = kv[:, self._key_width :].unflatten(1, self._value_shape)

    def read(self, layer: int, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """K/V (n, c) at rows (n,) and positions (n,) of a decoder layer."""
        return flatten_kv(self.keys[layer][row, :, position], self.values[layer][row, :, position])


def kv_bytes_per_position(decoder: Decoder) -> int:
    """Bytes that one position of one sequence takes over all layers."""
    elements = sum(heads * dim for heads, dim in _probe_shapes(decoder))
    return elements * decoder.num_layers * decoder.dtype.itemsize


def flatten_kv(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(n, heads, dim) keys and values -> (n, c)."""
    return torch.cat([key.flatten(1), value.flatten(1)], dim=1)


class PrefillView:
    """Whole prompts from position 0: queries see their own pass only.

    Args:
        rows: cache row of each sequence.
        lengths: tokens of each sequence; tokens of a pass are in this order.
    """

    def __init__(self, decoder: Decoder, cache: KvCache, *, rows: list[int], lengths: list[int]) -> None:
        self._cache, self._rows = cache, rows
        self._lengths, self._longest = lengths, max(lengths)
        self._even = min(lengths) == self._longest
        device = decoder.device
        index = torch.arange(self._longest, device=device)
        self._valid = index < torch.tensor(lengths, device=device)[:, None]  # (B, Q)
        self.position_embeddings = decoder.position_embeddings(index[None, :])
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
        if additive is None and (window is None or window >= self._longest):
            return None  # plain causality, which the attention function knows by itself
        if window not in self._masks:
            index = torch.arange(self._longest, device=self._valid.device)
            behind = index[:, None] - index[None, :]
            seen = (behind >= 0) & (behind < (window or self._longest))
            self._masks[window] = _as_mask(seen[None, None], additive)
        return self._masks[window]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """See `AttentionView`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for index, (row, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
            keys[row, :, :length] = key[index, :, :length]
            values[row, :, :length] = value[index, :, :length]
        return key, value


class DecodeView:
    """One new token per sequence.

    Args:
        row: (M,) cache row of each token's sequence.
        position: (M,) its position.
        longest: an upper bound of the positions, plus one.
        even: whether all positions equal longest - 1.
        token: (M,) names of the tokens, noted in `ledger` with their new K/V.
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
        token: torch.Tensor,
        ledger: KvLedger | None = None,
    ) -> None:
        self._cache, self._row, self._position = cache, row, position
        self._longest, self._even = longest, even
        self._token, self._ledger = token, ledger
        self.position_embeddings = position_embeddings
        self._slice = _as_slice(row)
        self._masks: dict[int | None, torch.Tensor] = {}

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
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        new_key, new_value = key[:, :, 0], value[:, :, 0]
        if self._ledger is not None:
            self._ledger.add(layer, self._token, flatten_kv(new_key, new_value))
        if self._slice is not None and self._even:
            keys[self._slice, :, self._longest - 1] = new_key
            values[self._slice, :, self._longest - 1] = new_value
        else:
            keys[self._row, :, self._position] = new_key
            values[self._row, :, self._position] = new_value
        # Consecutive rows are a view; others are gathered.
        rows = self._row if self._slice is None else self._slice
        return keys[rows, :, : self._longest], values[rows, :, : self._longest]


def _as_slice(row: torch.Tensor) -> slice | None:
    """The rows as a slice, where they are consecutive (looked at on the CPU only, where that is free)."""
    if row.device.type != "cpu" or not len(row):
        return None
    first, count = int(row[0]), len(row)
    return slice(first, first + count) if bool((row == torch.arange(first, first + count)).all()) else None


def _as_mask(seen: torch.Tensor, additive: torch.dtype | None) -> torch.Tensor:
    """A boolean mask, or zero and the lowest number for attention functions that add it."""
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, torch.finfo(additive).min)


class _Probe:
    """A view of one token that only looks at what attention wants to keep."""

    def __init__(self, decoder: Decoder) -> None:
        self.position_embeddings = decoder.position_embeddings(
            torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
        )
        self.shapes: tuple[tuple[int, int], tuple[int, int]] | None = None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(1)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1)

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        return None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.shapes = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        return key, value


def _probe_shapes(decoder: Decoder) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, dim) of keys and of values as attention caches them: with MLA they are latents, and they differ."""
    probe = _Probe(decoder)
    decoder.attend(0, decoder.embed(torch.zeros(1, dtype=torch.int64, device=decoder.device)), probe)
    assert probe.shapes is not None
    return probe.shapes
