"""Moves: how rows get from the tensors of a rank into its messages, and out of those of others.

Which rows go where is known on the host (index arrays of numpy). On a CPU messages are memory that numpy sees, and a
row is an item of it: `HostMoves` copies rows without a call of a tensor operator. On a GPU the heads of rows travel
between host and device in one copy, the rest is moved there: `DeviceMoves`. Both give the same bytes.

Memory for messages is kept and used again by the next message of the same name. A caller must not ask for it before
the collective that uses it has been waited for; `RowExchange` sees to that.

Shape letters: M rows of a tensor, n rows of a message.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from moeplace.runtime.exchange.row_layout import RowField, RowLayout

KEPT_BYTES = 1 << 26
"""Largest message whose memory is kept; a larger one takes longer to fill than to get."""
_NUMPY_TYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.uint8: np.uint8,
}


class Moves(Protocol):
    """See the module."""

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """(rows, width) memory for a message, not cleared; what was given under this name before is given up."""

    def index(self, rows: np.ndarray) -> torch.Tensor:
        """Row numbers, to index tensors with."""

    def pack(
        self,
        message: torch.Tensor,
        layout: RowLayout,
        heads: np.ndarray,
        place: np.ndarray,
        source: np.ndarray,
        values: Mapping[str, torch.Tensor],
    ) -> None:
        """Fill a message.

        Args:
            message: (n, row_bytes) uint8.
            layout: of its rows.
            heads: (n, head_words) int32, what rows begin with.
            place: rows of the message that get values.
            source: rows of `values` that they get.
            values: field -> (M, width).
        """

    def heads(self, message: torch.Tensor, layout: RowLayout) -> np.ndarray:
        """(n, head_words) int32, what the rows of a message begin with."""

    def join(
        self, own: torch.Tensor, kept: np.ndarray | None, message: torch.Tensor, field: RowField, place: np.ndarray
    ) -> torch.Tensor:
        """Rows `kept` of `own` (None = all), then a field of the rows `place` of a message: a new tensor."""


class HostMoves:
    """On a CPU."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}
        self._given: dict[str, tuple[torch.Tensor, np.ndarray]] = {}  # the last message of each name, in both forms

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """See `Moves`."""
        size = rows * width * dtype.itemsize
        kept = self._kept.get(name)
        if size > KEPT_BYTES:
            kept = np.empty(size, np.uint8)
        elif kept is None or len(kept) < size:
            kept = self._kept[name] = np.empty(min(2 * size, KEPT_BYTES), np.uint8)
        room = _tensor_on(kept[:size], rows, width, dtype)
        if dtype == torch.uint8 and size <= KEPT_BYTES:
            self._given[name] = room, kept[:size].reshape(rows, width)
        return room

    def _content(self, message: torch.Tensor) -> np.ndarray:
        """The bytes of a message, without a call of an operator where it was given here."""
        for given, content in self._given.values():
            if given is message:
                return content
        array: np.ndarray = message.numpy()
        return array

    def index(self, rows: np.ndarray) -> torch.Tensor:
        """See `Moves`."""
        return torch.from_numpy(rows)

    def pack(
        self,
        message: torch.Tensor,
        layout: RowLayout,
        heads: np.ndarray,
        place: np.ndarray,
        source: np.ndarray,
        values: Mapping[str, torch.Tensor],
    ) -> None:
        """See `Moves`."""
        content = self._content(message)
        content[:, : layout.head_words * 4].view(np.int32)[:] = heads
        for name, value in values.items():
            _items_in(content, layout.fields[name])[place] = _items_of(value)[source]

    def heads(self, message: torch.Tensor, layout: RowLayout) -> np.ndarray:
        """See `Moves`; a view."""
        return self._content(message)[:, : layout.head_words * 4].view(np.int32)

    def join(
        self, own: torch.Tensor, kept: np.ndarray | None, message: torch.Tensor, field: RowField, place: np.ndarray
    ) -> torch.Tensor:
        """See `Moves`."""
        count = len(own) if kept is None else len(kept)
        memory = np.empty((count + len(place)) * field.nbytes, np.uint8)
        items = memory.view(_item(field.nbytes))
        items[:count] = _items_of(own) if kept is None else _items_of(own)[kept]
        items[count:] = _items_in(self._content(message), field)[place]
        return _tensor_on(memory, len(items), field.width, field.dtype)


class DeviceMoves:
    """On a GPU; on a CPU too, for tests.

    What goes to the device is written into pinned memory that is kept, so that the copy needs no wait. It may be
    written again once the device has been waited for: `RowExchange` reads the heads of what it received before it
    packs the next message.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, torch.Tensor] = {}
        self._staged: dict[str, torch.Tensor] = {}

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """See `Moves`."""
        size = rows * width * dtype.itemsize
        if size > KEPT_BYTES:
            return torch.empty(rows, width, dtype=dtype, device=self._device)
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = torch.empty(min(2 * size, KEPT_BYTES), dtype=torch.uint8, device=self._device)
            self._kept[name] = kept
        return kept[:size].view(dtype).view(rows, width)

    def index(self, rows: np.ndarray) -> torch.Tensor:
        """See `Moves`."""
        return torch.from_numpy(rows).to(self._device)

    def pack(
        self,
        message: torch.Tensor,
        layout: RowLayout,
        heads: np.ndarray,
        place: np.ndarray,
        source: np.ndarray,
        values: Mapping[str, torch.Tensor],
    ) -> None:
        """See `Moves`."""
        head_nH = message[:, : layout.head_words * 4].view(torch.int32)
        head_nH.copy_(self._stage("heads", heads), non_blocking=True)
        moved = self._stage("places", np.stack([place, source]))
        target_n, source_n = moved.to(self._device, non_blocking=True).unbind(0)
        for name, value in values.items():
            layout.view(message, name)[target_n] = value.index_select(0, source_n)

    def heads(self, message: torch.Tensor, layout: RowLayout) -> np.ndarray:
        """See `Moves`; the host waits for the message."""
        heads: np.ndarray = message[:, : layout.head_words * 4].contiguous().cpu().numpy().view(np.int32)
        return heads

    def join(
        self, own: torch.Tensor, kept: np.ndarray | None, message: torch.Tensor, field: RowField, place: np.ndarray
    ) -> torch.Tensor:
        """See `Moves`."""
        first = own if kept is None else own.index_select(0, self.index(kept))
        return torch.cat([first, field.view(message).index_select(0, self.index(place))])

    def _stage(self, name: str, array: np.ndarray) -> torch.Tensor:
        """A copy in memory of the host that the device reads by itself."""
        kept = self._staged.get(name)
        if kept is None or kept.numel() < array.nbytes:
            pinned = self._device.type == "cuda"
            kept = self._staged[name] = torch.empty(2 * array.nbytes, dtype=torch.uint8, pin_memory=pinned)
        staged = kept[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        staged.numpy()[...] = array
        return staged


def make_moves(device: torch.device) -> Moves:
    """The moves of a device."""
    return HostMoves() if device.type == "cpu" else DeviceMoves(device)


def _item(nbytes: int) -> np.dtype:
    """A row as one item that numpy copies whole."""
    return np.dtype((np.void, nbytes))


def _items_in(content: np.ndarray, field: RowField) -> np.ndarray:
    """(n,) items: a field of the rows of a message, in place."""
    if not len(content):
        return np.empty(0, _item(field.nbytes))
    return np.ndarray(
        (len(content),), _item(field.nbytes), content.reshape(-1), field.offset, strides=(content.shape[1],)
    )


def _items_of(value: torch.Tensor) -> np.ndarray:
    """(M,) items: the rows of a tensor, in place."""
    value = value.contiguous()
    array = value.numpy() if value.dtype in _NUMPY_TYPES else value.view(torch.uint8).numpy()
    return array.reshape(-1).view(_item(value.shape[1] * value.element_size()))


def _tensor_on(memory: np.ndarray, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, width) on the bytes of an array; of types that numpy knows without a call of an operator."""
    numpy_type = _NUMPY_TYPES.get(dtype)
    if numpy_type is not None:
        return torch.from_numpy(memory.view(numpy_type).reshape(rows, width))
    return torch.from_numpy(memory.reshape(rows, width * dtype.itemsize)).view(dtype)
