"""Finds how quantised experts can stay as they are on disk: which stored matrices make which rows of gate_up and down.

What a converter of `transformers` does (stacking experts, gate above up, turning) is seen by giving it numbers: where
its result is the stored matrices one below the other, a rank can do the same when it needs a matrix. Where it is not,
or where experts or layers are stored in different ways, experts are unpacked while they are read.
"""

from itertools import permutations, product
from typing import Any, cast

import torch

from moeplace.profiling.errors import FormatError
from moeplace.profiling.recording.quantised.forms import StoredForm
from moeplace.profiling.recording.stored_tensors import PartKind, StoredTensors
from moeplace.runtime.experts.packed import PackedLayout, Piece, part_name
from moeplace.runtime.experts.weights import Matrix
from moeplace.runtime.models.expert_sources import ExpertSources, Source
from moeplace.runtime.models.family import ExpertsForm, Family

_Arrangement = tuple[tuple[str, bool], ...]
"""Patterns from the first row of a matrix to the last, and whether each plain tensor must be turned."""


def find_layout(family: Family, sources: ExpertSources, stored: StoredTensors) -> PackedLayout | None:
    """How experts are stored, None = they are plain, or cannot stay as they are."""
    if not stored.quantisation.method:
        return None
    finder = _Finder(sources, stored)
    first = finder.layout_of(family.forms[0])
    if first is None or not first.is_quantised:
        return None
    return first if all(finder.layout_of(form) == first for form in family.forms[1:]) else None


def read_packed(
    layout: PackedLayout, form: ExpertsForm, sources: ExpertSources, stored: StoredTensors, layer: int, expert: int
) -> dict[str, torch.Tensor]:
    """The parts of one expert as `layout` names them.

    Raises:
        FormatError: the expert is stored in another way than the others.
    """
    parts: dict[str, torch.Tensor] = {}
    for parameter, part in form.parts.items():
        if part in layout.biases:
            parts[part] = sources.plain_part(form, parameter, expert, stored.slice_of)
            continue
        matrix, source = cast(Matrix, part), sources.source_of(form, parameter)
        for index, piece in enumerate(layout.matrices[matrix]):
            name = source.name_of(piece.pattern, expert)
            own = stored.parts_of(name, ... if source.is_per_expert else expert)
            named = {part_name(matrix, index, key): value for key, value in own.items()}
            if any(layout.kinds.get(key) != PartKind(v.dtype, tuple(v.shape)) for key, v in named.items()):
                raise FormatError(f"expert {expert} of MoE layer {layer} is stored in another way than others ({name})")
            parts |= named
    return parts


class _Finder:
    """Looks at the experts of layers."""

    def __init__(self, sources: ExpertSources, stored: StoredTensors) -> None:
        self._sources, self._stored = sources, stored
        self._arrangements: dict[Any, _Arrangement | None] = {}

    def layout_of(self, form: ExpertsForm) -> PackedLayout | None:
        """The layout of a layer, None = a rank cannot make its matrices."""
        matrices: dict[Matrix, tuple[Piece, ...]] = {}
        kinds: dict[str, PartKind] = {}
        for parameter, part in form.parts.items():
            if part not in ("gate_up", "down"):
                continue
            source = self._sources.source_of(form, parameter)
            pieces = self._pieces(form, parameter, source)
            if pieces is None:
                return None
            matrices[part] = pieces
            for index, piece in enumerate(pieces):
                for key, kind in self._stored.kinds_of(source.name_of(piece.pattern, 0)).items():
                    shape = kind.shape if source.is_per_expert else kind.shape[1:]
                    kinds[part_name(part, index, key)] = kind._replace(shape=shape)
        biases = {str(part): shape for part, shape in form.shapes.items() if part.endswith("_bias")}
        return PackedLayout(matrices, kinds, biases, {matrix: form.shapes[matrix][0] for matrix in matrices})

    def _pieces(self, form: ExpertsForm, parameter: str, source: Source) -> tuple[Piece, ...] | None:
        forms: dict[str, StoredForm] = {}
        for pattern, names in source.names.items():
            found = {self._stored.form_of(name) for name in names}
            if len(found) > 1 or not self._is_sliceable(source, names[0]):
                return None
            forms[pattern] = found.pop()
        arrangement = self._arrangement(form, parameter, source)
        if arrangement is None:
            return None
        return tuple(Piece(forms[p], p, is_turned != forms[p].is_transposed) for p, is_turned in arrangement)

    def _is_sliceable(self, source: Source, name: str) -> bool:
        """Whether one expert can be cut out of all tensors of a matrix."""
        if source.is_per_expert:
            return True
        experts = self._stored.shape_of(name)[0]
        return all(kind.shape[:1] == (experts,) for kind in self._stored.kinds_of(name).values())

    def _arrangement(self, form: ExpertsForm, parameter: str, source: Source) -> _Arrangement | None:
        """What the conversion makes of numbers; the same conversion of the same shapes is tried once."""
        names = {pattern: source.name_of(pattern, 0) for pattern in source.names}
        shapes = {pattern: tuple(self._stored.shape_of(name)[-2:]) for pattern, name in names.items()}
        key = (parameter, id(source.converter), tuple(shapes.items()))
        if key not in self._arrangements:
            generator = torch.Generator().manual_seed(0)
            numbers = {pattern: torch.randn(shape, generator=generator) for pattern, shape in shapes.items()}
            given = {name: _Numbers(numbers[pattern]) for pattern, name in names.items()}
            made = self._sources.plain_part(form, parameter, 0, given.__getitem__)
            self._arrangements[key] = _arrange(numbers, made)
        return self._arrangements[key]


class _Numbers:
    """A matrix that stands for a tensor on disk, of one expert or of all."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._matrix[None] if isinstance(index, slice) else self._matrix


def _arrange(numbers: dict[str, torch.Tensor], made: torch.Tensor) -> _Arrangement | None:
    """The order and turns in which matrices, one below the other, are `made`."""
    for order in permutations(numbers):
        for turns in product((False, True), repeat=len(order)):
            pieces = [numbers[p].t() if is_turned else numbers[p] for p, is_turned in zip(order, turns, strict=True)]
            is_fitting = len({piece.shape[1] for piece in pieces}) == 1
            if is_fitting and torch.equal(torch.cat(pieces), made):
                return tuple(zip(order, turns, strict=True))
    return None
