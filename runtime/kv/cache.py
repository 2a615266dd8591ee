"""KvCache: keys and values of sequences, one row per sequence and a fixed number of positions: memory is bounded.

Shape letters: n tokens, c K/V elements per token and layer.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moeplace.runtime.kv.lazy_zeros import LazyZeros
from moeplace.runtime.kv.row_reading import RowGathering
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.opening import ServedModel
from moeplace.runtime.models.token_attention import SeenKv
from moeplace.runtime.models.whole import WholeModel


class KvCache:
    """Rows of keys and values.

    Attributes:
        all_keys, all_values: (layers, rows, heads, positions, dim).
        keys: per decoder layer (rows, heads, positions, key dim).
        values: per decoder layer (rows, heads, positions, value dim).
        num_layers: decoder layers.
        replicated: whether a sequence has its row on every rank.
        row_of_nobody: a row beyond the others, for tokens of nobody (passes in fixed shapes), if there is one.
        row_width: c.
    """

    def __init__(
        self, decoder: Decoder, *, rows: int, positions: int, replicated: bool = False, seats_nobody: bool = False
    ) -> None:
        """`replicated`: a sequence has its row on every rank, not at its home alone; `seats_nobody`: so have tokens of
        nobody.
        """
        key_shape, value_shape = _probe_shapes(decoder)
        num_rows = rows + seats_nobody
        self._memory = [
            LazyZeros((decoder.num_layers, num_rows, heads, positions, dim), dtype=decoder.dtype, device=decoder.device)
            for heads, dim in (key_shape, value_shape)
        ]
        self.all_keys, self.all_values = (memory.tensor for memory in self._memory)
        self.keys, self.values = self.all_keys.unbind(0), self.all_values.unbind(0)
        self.rows, self.positions, self.num_layers = rows, positions, decoder.num_layers
        self.replicated, self.row_of_nobody = replicated, rows
        self._filled = [0] * rows  # positions of each row beyond which it is all zeros
        self._key_shape, self._value_shape = key_shape, value_shape
        self._key_width = key_shape[0] * key_shape[1]
        self.row_width = self._key_width + value_shape[0] * value_shape[1]
        self._gathering = RowGathering()

    def claim(self, row: int, end: int) -> None:
        """Let a row be of use up to a position: what a former tenant left beyond becomes zero.

        Attention reads rows up to the longest sequence of a batch. What is masked there is multiplied by zero: that
        leaves nothing of a number, but NaN and infinity would reach the tenant.
        """
        if self._filled[row] > end:
            for slab in (*self.keys, *self.values):
                slab[row, :, end : self._filled[row]] = 0
        self._filled[row] = end

    def trim(self, row: int, end: int) -> None:
        """Give the memory of a row beyond a position back; it is zero there."""
        if self._filled[row] > end:
            for memory in self._memory:
                memory.clear(row, end, self._filled[row])
            self._filled[row] = end

    def copy(self, source: int, target: int, end: int) -> None:
        """Let the first positions of a row, up to `end`, be those of another one."""
        if source != target:
            for slab in (self.all_keys, self.all_values):
                slab[:, target, :, :end] = slab[:, source, :, :end]
            self._filled[target] = max(self._filled[target], end)

    def gather(self, layer: int, row: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first positions, up to `end`, of rows (n,): good until this is asked for again."""
        keys, values = self.keys[layer], self.values[layer]
        gather = self._gathering.gather
        return gather("keys", keys, row, end), gather("values", values, row, end)

    def write(self, layer: int, row: torch.Tensor, position: torch.Tensor, kv: torch.Tensor) -> None:
        """Store K/V (n, c) at rows (n,) and positions (n,) of a decoder layer."""
        self.keys[layer][row, :, position] = kv[:, : self._key_width].unflatten(1, self._key_shape)
        self.values[layer][row, :, position] = kv[:, self._key_width :].unflatten(1, self._value_shape)

    def write_layers(self, layer: torch.Tensor, row: torch.Tensor, position: torch.Tensor, kv: torch.Tensor) -> None:
        """`write` of rows of several decoder layers (n,) at once."""
        self.all_keys[layer, row, :, position] = kv[:, : self._key_width].unflatten(1, self._key_shape)
        self.all_values[layer, row, :, position] = kv[:, self._key_width :].unflatten(1, self._value_shape)

    def write_all_layers(self, row: torch.Tensor, position: torch.Tensor, kv: torch.Tensor) -> None:
        """Store K/V (layers, n, c) at rows (n,) and positions (n,) of every decoder layer."""
        key, value = kv.transpose(0, 1).split([self._key_width, kv.shape[2] - self._key_width], dim=2)
        self.all_keys[:, row, :, position] = key.unflatten(2, self._key_shape)
        self.all_values[:, row, :, position] = value.unflatten(2, self._value_shape)

    def read(self, layer: int, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """K/V (n, c) at rows (n,) and positions (n,) of a decoder layer."""
        return flatten_kv(self.keys[layer][row, :, position], self.values[layer][row, :, position])


def kv_bytes_per_position(model: ServedModel) -> int:
    """Bytes that one position of one sequence takes over all layers."""
    if isinstance(model, WholeModel):
        return model.state_bytes_per_position
    elements = sum(heads * dim for heads, dim in _probe_shapes(model))
    return elements * model.num_layers * model.dtype.itemsize


def kv_bytes_per_sequence(model: ServedModel, positions: int) -> int:
    """Bytes that a sequence takes over all layers, recurrent states included."""
    fixed = model.fixed_state_bytes if isinstance(model, WholeModel) else 0
    return max(kv_bytes_per_position(model) * positions + fixed, 1)


def flatten_kv(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(n, heads, dim) keys and values -> (n, c)."""
    return torch.cat([key.flatten(1), value.flatten(1)], dim=1)


class _Probe:
    """A view of one token that only looks at what attention wants to keep."""

    rotation = None

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

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        raise AssertionError("without a rotation nothing is stored so")

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.shapes = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        return key, value


def _probe_shapes(decoder: Decoder) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, dim) of keys and of values as attention caches them: with MLA they are latents, and they differ."""
    probe = _Probe(decoder)
    decoder.attend(0, decoder.embed(torch.zeros(1, dtype=torch.int64, device=decoder.device)), probe)
    assert probe.shapes is not None
    return probe.shapes
