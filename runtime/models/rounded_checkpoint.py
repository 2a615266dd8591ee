"""RoundedCheckpoint: a checkpoint whose experts are read in the precision that a plan gives each of them.

Every rank that reads an expert, at the start, when it joins, or from disk, gets the same numbers. They are kept and
moved in the engine's number type: what a precision saves is what a plan counts, not yet memory of a rank.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.experts.rounding import PRECISIONS, rounded
from moeplace.runtime.models.checkpoint import Checkpoint


class RoundedCheckpoint(Checkpoint):
    """See the module.

    Attributes:
        precisions: names, by the numbers of `choice_LE`.
        choice_LE: (L, E) precision of each expert.
    """

    def __init__(self, path: str | Path, precisions: Sequence[str], choice_LE: np.ndarray) -> None:
        """Open a checkpoint of plain experts.

        Raises:
            InputError: its experts are quantised already, or the plan is for other experts, or names a precision that
                there is not; or as `Checkpoint`.
        """
        super().__init__(path)
        if self.layout is not None:
            raise InputError(f"{path} has quantised experts: they are served as they are")
        shape = (self.num_layers, int(self.experts_per_layer.max()))
        if choice_LE.shape != shape:
            raise InputError(f"the plan of precisions is for {choice_LE.shape} layers and experts, {path} has {shape}")
        for name in precisions:
            if name not in PRECISIONS:
                raise InputError(f"precision {name!r} must be one of {', '.join(PRECISIONS)}")
        self.precisions, self.choice_LE = tuple(precisions), choice_LE

    @cached_property
    def fingerprint(self) -> str:
        """See `Checkpoint`; of other precisions, another one."""
        words = [super().fingerprint, *self.precisions, self.choice_LE.astype(np.int64).tobytes().hex()]
        return "sha256:" + hashlib.sha256(" ".join(words).encode()).hexdigest()

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """See `Checkpoint`."""
        return rounded(super().expert(layer, expert), self.precisions[self.choice_LE[layer, expert]])
