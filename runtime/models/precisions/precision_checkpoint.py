"""PrecisionCheckpoint: a checkpoint whose experts are kept in the precisions that a plan gives them.

Ranks read plain experts and pack them (`MixedWeights`): at the start, when they join, and from disk. What they keep,
load into fast memory and send to each other is packed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.experts.bit_form import BitForm, PlainPart
from moeplace.runtime.experts.mixed import MixedWeights
from moeplace.runtime.experts.rounding import PRECISIONS
from moeplace.runtime.experts.weights import LayerWeights, Part
from moeplace.runtime.models.checkpoint import Checkpoint


class PrecisionCheckpoint(Checkpoint):
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
        self._forms: dict[tuple[int, torch.dtype], tuple[BitForm, ...]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """See `Checkpoint`; of other precisions, and of another way to keep them, another one."""
        chosen = self.choice_LE.astype(np.int64).tobytes().hex()
        words = [super().fingerprint, type(self).__name__, *self.precisions, chosen]
        return "sha256:" + hashlib.sha256(" ".join(words).encode()).hexdigest()

    def room(
        self, rows: int, *, dtype: torch.dtype, device: str | torch.device, layer: int | None = None
    ) -> LayerWeights:
        """See `Checkpoint`."""
        layers = range(self.num_layers) if layer is None else (layer,)
        return MixedWeights(rows, [form for one in layers for form in self._forms_of(one, dtype)], device=device)

    def sizes(self, dtype: torch.dtype) -> np.ndarray:
        """See `Checkpoint`."""
        found = np.zeros(self.choice_LE.shape, np.int64)
        for layer, count in enumerate(self.experts_per_layer):
            found[layer, :count] = [form.size for form in self._forms_of(layer, dtype)]
        return found

    def _forms_of(self, layer: int, dtype: torch.dtype) -> tuple[BitForm, ...]:
        """How each expert of a layer is kept by an engine of a number type."""
        if (layer, dtype) not in self._forms:
            plain = self._plain_parts(layer, dtype)
            by_name = {name: BitForm.of(name, plain) for name in self.precisions}
            chosen = self.choice_LE[layer, : self.experts_per_layer[layer]]
            self._forms[layer, dtype] = tuple(by_name[self.precisions[index]] for index in chosen)
        return self._forms[layer, dtype]

    def _plain_parts(self, layer: int, dtype: torch.dtype) -> dict[Part, PlainPart]:
        """What the parts of a layer's experts are on disk, by the headers of its files."""
        form = self.family.forms[layer]
        found = {}
        for parameter, part in form.parts.items():
            names = [names[0] for names in self._sources.source_of(form, parameter).names.values()]
            kinds = [kind for name in names for kind in self.stored.kinds_of(name).values()]
            stored = reduce(torch.promote_types, (kind.dtype for kind in kinds))
            kept = dtype if dtype.itemsize < stored.itemsize else stored
            found[part] = PlainPart(tuple(form.shapes[part]), stored, kept)
        return found


def open_checkpoint(path: str | Path, precision: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint, served exactly or by a plan.

    Args:
        path: folder.
        precision: `names` of precisions and the (L, E) `choice` among them, as plain data; None = exact.

    Raises:
        InputError: as `PrecisionCheckpoint` or `Checkpoint` raises.
    """
    if precision is None:
        return Checkpoint(path)
    return PrecisionCheckpoint(path, precision["names"], np.array(precision["choice"], np.int64))
