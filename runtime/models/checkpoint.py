"""Checkpoint: Hugging Face safetensors, opened lazily. A rank reads the tensors of its own experts and nothing more.

Which layers have experts, and what their parameters are, is what the family's modules say (`Family`); which tensors on
disk they are made of is what `transformers`' tables say (`ExpertSources`). Quantised experts stay as they are on disk
where a rank can make its matrices of them (`find_layout`); they are unpacked while reading where it cannot.

Shape letters: L MoE layers, E experts per layer, D hidden size, H expert hidden size.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json
from moeplace.profiling.recording.checkpoint_files import check_checkpoint
from moeplace.profiling.recording.stored_tensors import StoredTensors
from moeplace.runtime.experts.packed import PackedLayout, PackedWeights
from moeplace.runtime.experts.weights import ExpertWeights, LayerWeights
from moeplace.runtime.models.expert_layout import find_layout, read_packed
from moeplace.runtime.models.expert_sources import ExpertSources
from moeplace.runtime.models.family import Family

_SAMPLED_BYTES = 4096


class Checkpoint:
    """A checkpoint folder: its configuration, its tensors by name, its experts by (layer, expert).

    Attributes:
        path: the folder.
        config: content of config.json.
        family: what `transformers` has for it.
        stored: its tensors.
        layer_ids: (L,) decoder-layer index of each MoE layer.
        experts_per_layer: (L,) experts of each.

    Raises:
        InputError: there is no such folder, the model is dense, or its family is not supported.
        FormatError: a file is missing, truncated or foreign, or an expert is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_checkpoint(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.family = Family(self.path)
        self.stored = StoredTensors(self.path, self.family.quantisation)
        self._sources = ExpertSources(self.family, self.stored.names)
        self.layer_ids = np.array([form.experts.layer_id for form in self.family.forms])
        self.experts_per_layer = np.array([form.experts.num_experts for form in self.family.forms])
        dense = self._sources.unexpected_layer(self.layer_ids.tolist(), self.num_hidden_layers)
        if dense is not None:
            raise FormatError(f"{self.path} has experts in decoder layer {dense}, which its config.json makes dense")
        try:
            for layer in range(self.num_layers):
                self._sources.check(layer, self.stored.shape_of)
        except FormatError as error:
            raise FormatError(f"{self.path} {error}") from error

    @property
    def model_type(self) -> str:
        return self.family.name

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers, dense ones included."""
        return max(int(self.family.text_config.num_hidden_layers), int(self.layer_ids.max()) + 1)

    @property
    def top_k(self) -> int:
        """Experts of a token, as far as the configuration says; else 2."""
        names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
        found = next((value for name in names if (value := getattr(self.family.text_config, name, None))), 2)
        return max(found) if isinstance(found, list) else int(found)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence ids: generation_config.json first, then config.json."""
        path = self.path / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        ids = generation.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    @property
    def num_layers(self) -> int:
        """L: MoE layers."""
        return len(self.layer_ids)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration, of every tensor's name, type and shape, and of samples of the values."""
        content = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.stored.files:
            size = shard.stat().st_size
            with open(shard, "rb") as file:
                content.update(file.read(int.from_bytes(file.read(8), "little")))  # names, types, shapes
                for sample in range(16):
                    file.seek(sample * max(size - _SAMPLED_BYTES, 0) // 15)
                    content.update(file.read(_SAMPLED_BYTES))
        return "sha256:" + content.hexdigest()

    def check_placement(self, placement: Placement) -> None:
        """Whether a placement is for this model.

        Raises:
            InputError: layers or experts differ.
        """
        if not np.array_equal(placement.experts_per_layer, self.experts_per_layer):
            raise InputError(
                f"the placement is for {_describe(placement.experts_per_layer)}, but {self.path} has "
                f"{_describe(self.experts_per_layer)}"
            )
        unnumbered = np.array_equal(placement.layer_ids, np.arange(self.num_layers))  # type: ignore[arg-type]
        if not unnumbered and not np.array_equal(placement.layer_ids, self.layer_ids):  # type: ignore[arg-type]
            raise InputError(
                f"the placement is for the MoE layers {np.asarray(placement.layer_ids).tolist()}, but those of "
                f"{self.path} are {self.layer_ids.tolist()}"
            )

    def other_names(self) -> Iterator[str]:
        """Names of all tensors that are not routed experts of the model's own layers."""
        return (name for name in self.stored.names if name not in self._sources.names)

    def check_shapes(self) -> None:
        """Whether tensors that go into the model unchanged have its shapes.

        Raises:
            FormatError: one has another shape.
        """
        state = self.family.model.state_dict()
        for name in self.other_names():
            target = self._sources.renamed[name]
            if self._sources.is_converted(name) or target not in state:
                continue
            stored, stated = self.stored.shape_of(name), list(state[target].shape)
            if stored != stated:
                raise FormatError(f"{self.path}: the tensor {name} has shape {stored}, its config.json says {stated}")

    @cached_property
    def layout(self) -> PackedLayout | None:
        """How ranks hold quantised experts as they are on disk; None = they hold plain matrices."""
        return find_layout(self.family, self._sources, self.stored)

    def room(
        self, rows: int, *, dtype: torch.dtype, device: str | torch.device, layer: int | None = None
    ) -> LayerWeights:
        """Room for some experts of a layer (None: of any), uninitialised; `dtype`: of what is not quantised."""
        if self.layout is not None:
            return PackedWeights.of_layout(rows, self.layout, dtype=dtype, device=device)
        return ExpertWeights.of_shapes(rows, self.family.forms[0].shapes, dtype=dtype, device=device)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of an expert on a rank, of the largest where they differ."""
        return self.room(1, dtype=dtype, device="meta").row_size

    def sizes(self, dtype: torch.dtype) -> np.ndarray:
        """(L, E) int64 bytes of each expert on a rank, 0 where a layer has fewer."""
        is_real_LE = np.arange(self.experts_per_layer.max()) < self.experts_per_layer[:, None]
        return np.where(is_real_LE, self.expert_bytes(dtype), 0)

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The parts of one expert, in the runtime's layout; nothing else is read.

        Args:
            layer: MoE layer, 0 .. L-1.
            expert: 0 .. E-1.

        Returns:
            gate_up (2H, D), or (H, D) where experts are not gated, down (D, H), and where the model has them
            gate_up_bias and down_bias; of quantised experts the tensors of `layout`.
        """
        if self.layout is not None:
            return read_packed(self.layout, self.family.forms[layer], self._sources, self.stored, layer, expert)
        return self._sources.plain_parts(layer, expert, self.stored.slice_of)


def _describe(experts_per_layer: np.ndarray) -> str:
    counts = sorted({int(count) for count in experts_per_layer})
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(experts_per_layer)} MoE layers of {experts} experts"
