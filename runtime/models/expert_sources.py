"""Where the experts of a checkpoint are on disk, by `transformers`' own table of names, and how one expert is read.

    one tensor per expert   model.layers.l.mlp.experts.e.gate_proj.weight, ...: those of expert e are converted alone
    one tensor per layer    model.layers.l.block_sparse_moe.input_linear.weight (E, ...): a slice of its first dimension

Conversion (stacking, gate and up side by side, ...) is done by the operations that `transformers` loads with, on one
expert instead of all.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from moeplace.profiling.errors import FormatError
from moeplace.profiling.recording.target_names import TargetNames
from moeplace.runtime.models.family import ExpertsForm, Family

_NUMBERED = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")
"""The last number in a name: the expert."""

_LAYER_OF_EXPERT = re.compile(r"layers\.(\d+)\.\w+\.experts\.\d+\.")


@dataclass
class Source:
    """Tensors on disk that make one parameter of one experts module.

    Attributes:
        target: the parameter's name in the model.
        converter: what makes it of them, None = it is stored as it is.
        names: names on disk by the converter's pattern; by "" without a converter.
    """

    target: str
    converter: Any = None
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def is_per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return any("*" in pattern for pattern in self.names)

    def name_of(self, pattern: str, expert: int) -> str:
        """The tensor of a pattern that an expert is in."""
        names = self.names[pattern]
        return next(name for name in names if _expert_of(name) == expert) if "*" in pattern else names[0]


class ExpertSources:
    """Sources of all experts of a checkpoint.

    Attributes:
        names: of all tensors on disk that belong to routed experts.
        renamed: name in the model of every other tensor on disk.
    """

    def __init__(self, family: Family, names: Iterable[str]) -> None:
        self._family = family
        table = TargetNames(family.model)
        targets = {f"{form.experts.name}.{name}" for form in family.forms for name in form.experts.parameters()}
        self.names: set[str] = set()
        self.renamed: dict[str, str] = {}
        self._sources: dict[str, Source] = {}
        self._converted: set[str] = set()
        for name in sorted(names, key=_natural):
            target, pattern = table.of(name)
            if target not in targets:
                self.renamed[name] = target
                if pattern is not None:
                    self._converted.add(name)
                continue
            self.names.add(name)
            source = self._sources.setdefault(target, Source(target))
            source.converter = None if pattern is None else table.converters[pattern]
            source.names[pattern or ""].append(name)

    def is_converted(self, name: str) -> bool:
        """Whether a tensor that is no expert's is more than renamed on its way into the model."""
        return name in self._converted

    def check(self, layer: int, shape_of: Callable[[str], list[int]]) -> None:
        """Whether all experts of an MoE layer are there.

        Raises:
            FormatError: one is missing, in whole or in part, or there is one too many.
        """
        form = self._family.forms[layer]
        count, most = form.experts.num_experts, form.experts.num_experts + form.experts.num_null
        layer_id = form.experts.layer_id
        found: set[int] = set()
        for name in form.experts.parameters():
            source = self._sources.get(f"{form.experts.name}.{name}")
            if source is None:
                raise FormatError(self._describe_foreign(form, name))
            if not source.is_per_expert:
                rows = shape_of(next(iter(source.names.values()))[0])[0]
                found.update(range(rows))
                continue
            for names in source.names.values():
                found.update(_expert_of(name) for name in names)
        wrong = sorted(set(range(count)) - found) or sorted(expert for expert in found if expert >= most)
        if wrong:
            what = "lacks" if wrong[0] < count else "has the superfluous"
            raise FormatError(f"{what} expert {wrong[0]} of decoder layer {layer_id}; its layers have {count}")
        self._check_parts(form, count)

    def _describe_foreign(self, form: ExpertsForm, parameter: str) -> str:
        """What there is instead of a parameter of experts."""
        foreign = next((name for name, target in self.renamed.items() if f"{form.experts.name}." in target), None)
        if foreign is None:
            return f"lacks the tensor {form.experts.name}.{parameter}"
        return (
            f"stores its experts in a form that is not supported ({foreign}): quantised experts must be converted to "
            "plain tensors first"
        )

    def unexpected_layer(self, layer_ids: Iterable[int], depth: int) -> int | None:
        """A decoder layer that has experts on disk and none in the model."""
        known = set(layer_ids)
        for name in self.renamed:
            match = _LAYER_OF_EXPERT.search(name)
            if match is not None and int(match.group(1)) < depth and int(match.group(1)) not in known:
                return int(match.group(1))
        return None

    def _check_parts(self, form: ExpertsForm, count: int) -> None:
        for name in form.experts.parameters():
            source = self._sources[f"{form.experts.name}.{name}"]
            patterns = source.names if source.converter is None else source.converter.source_patterns
            for pattern in patterns if source.is_per_expert else ():
                names = source.names.get(pattern, [])
                missing = set(range(count)) - {_expert_of(name) for name in names}
                if missing:
                    like = names[0] if names else next(iter(source.names.values()))[0]
                    raise FormatError(f"lacks the tensor {_named_like(like, pattern, min(missing))}")

    def source_of(self, form: ExpertsForm, parameter: str) -> Source:
        """What makes a parameter of the experts of a layer."""
        return self._sources[f"{form.experts.name}.{parameter}"]

    def plain_parts(self, layer: int, expert: int, slice_of: Callable[[str], Any]) -> dict[str, torch.Tensor]:
        """The parts of one expert as the runtime multiplies with them.

        Args:
            layer: MoE layer.
            expert: its index.
            slice_of: name on disk -> a lazy slice of safetensors.

        Raises:
            FormatError: the conversion fails.
        """
        form = self._family.forms[layer]
        return {part: self.plain_part(form, name, expert, slice_of) for name, part in form.parts.items()}

    def plain_part(
        self, form: ExpertsForm, parameter: str, expert: int, slice_of: Callable[[str], Any]
    ) -> torch.Tensor:
        """One of the `plain_parts`."""
        return form.to_runtime(parameter, self._convert(self.source_of(form, parameter), expert, slice_of))

    def _convert(self, source: Source, expert: int, slice_of: Callable[[str], Any]) -> torch.Tensor:
        if source.converter is None:
            return slice_of(source.names[""][0])[expert]
        mapping = deepcopy(source.converter)
        for pattern in source.names:
            name, index = source.name_of(pattern, expert), ... if "*" in pattern else slice(expert, expert + 1)
            mapping.add_tensor(source.target, name, pattern, _Lazy(slice_of(name), index))
        try:
            made = mapping.convert(source.target, model=self._family.model, config=self._family.config)
            value = made[source.target]
        except Exception as error:  # foreign shapes can fail in any operation of transformers
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"cannot make expert {expert} of {source.target}: {reason}") from error
        return (value[0] if isinstance(value, list) else value)[0]


@dataclass(frozen=True)
class _Lazy:
    """Reads a slice when it is called: what a converter of `transformers` takes for a tensor."""

    source: Any
    index: Any

    def __call__(self) -> torch.Tensor:
        return self.source[self.index]


def _expert_of(name: str) -> int:
    match = _NUMBERED.search(name)
    if match is None:
        raise FormatError(f"the tensor {name} does not say to which expert it belongs")
    return int(match.group(1))


def _named_like(name: str, pattern: str, expert: int) -> str:
    """The name of another expert's tensor: the number exchanged, and the end as the pattern has it."""
    stem = _NUMBERED.split(name)[0]
    return f"{stem}.{expert}.{pattern.rpartition('*.')[2]}"


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
