"""RoundedCheckpoint: the numbers of a `PrecisionCheckpoint`, kept in the engine's number type.

It saves no bytes and needs no matrices to be made while it serves: for those who ask what precisions spoil.
"""

import numpy as np
import torch

from moeplace.runtime.experts.rounding import rounded
from moeplace.runtime.experts.weights import LayerWeights
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.precisions.precision_checkpoint import PrecisionCheckpoint


class RoundedCheckpoint(PrecisionCheckpoint):
    """See the module; every rank that reads an expert gets the same numbers."""

    def room(
        self, rows: int, *, dtype: torch.dtype, device: str | torch.device, layer: int | None = None
    ) -> LayerWeights:
        """See `Checkpoint`."""
        return Checkpoint.room(self, rows, dtype=dtype, device=device, layer=layer)

    def sizes(self, dtype: torch.dtype) -> np.ndarray:
        """See `Checkpoint`."""
        return Checkpoint.sizes(self, dtype)

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """See `Checkpoint`."""
        return rounded(super().expert(layer, expert), self.precisions[self.choice_LE[layer, expert]])
