"""TargetNames: where the tensors of a checkpoint go in a model, by `transformers`' own table of conversions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplace.profiling.recording.experts_modules import ExpertsModule
from moeplace.profiling.recording.stored_tensors import StoredTensors


class TargetNames:
    """Names on disk -> names in a model, which may be on the meta device.

    Attributes:
        converters: pattern of names on disk -> what makes parameters of their tensors.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        self.converters: dict[str, Any] = {
            pattern: entry for entry in self._converters for pattern in entry.source_patterns
        }
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def of(self, name: str) -> tuple[str, str | None]:
        """The parameter that a tensor goes to, alone or with others, and its pattern if it is converted."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        return (name, None) if target not in self._state and name in self._state else (target, pattern)


def stored_expert_bytes(model: Any, experts: Sequence[ExpertsModule], stored: StoredTensors) -> np.ndarray:
    """(L,) bytes of one expert of each experts module as the checkpoint stores them, scales and zeros included."""
    table, held = TargetNames(model), dict.fromkeys((module.name for module in experts), 0)
    for name in stored.names:
        module = next((known for known in _owners(table.of(name)[0]) if known in held), None)
        if module is not None:
            held[module] += stored.bytes_of(name)
    return np.array([held[module.name] // (module.num_experts + module.num_null) for module in experts])


def _owners(target: str) -> list[str]:
    """The modules that a parameter may be part of, the innermost first."""
    parts = target.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
