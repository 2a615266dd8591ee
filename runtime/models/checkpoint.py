"""Checkpoint: Hugging Face safetensors, opened lazily. A rank reads the tensors of its own experts and nothing more.

Experts on disk, by layer l and expert e:

    model.layers.l.mlp.experts.e.{gate,up,down}_proj.weight           OLMoE, Qwen, DeepSeek
    model.layers.l.block_sparse_moe.experts.e.{w1,w3,w2}.weight       Mixtral (gate, up, down)
    model.layers.l.mlp.experts.{gate_up,down}_proj[_bias]             fused (E, ...); gpt-oss: transposed, gate and up
                                                                      in alternate columns

Shape letters: L MoE layers, E experts per layer, D hidden size, H expert hidden size.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json
from moeplace.profiling.recording.checkpoint_files import check_checkpoint
from moeplace.runtime.experts.weights import Part

_INDEX = "model.safetensors.index.json"
_EXPERT = re.compile(
    r"^(?P<stem>.*layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts)\."
    r"(?:(?P<expert>\d+)\.(?P<part>\w+)\.weight|(?P<fused>gate_up_proj|down_proj)(?P<bias>_bias)?)$"
)
_ANY_EXPERT = re.compile(r"layers\.\d+\.\w+\.experts\.")
_NAMES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_INTERLEAVED = ("gpt_oss",)
"""Model types whose fused experts are (in, out), with gate and up in alternate columns."""
_SAMPLED_BYTES = 4096


class Checkpoint:
    """A checkpoint folder: its configuration, its tensors by name, its experts by (layer, expert).

    Attributes:
        path: the folder.
        config: content of config.json.
        layer_ids: (L,) decoder-layer index of each MoE layer.
        experts_per_layer: (L,) experts of each.

    Raises:
        InputError: there is no such folder, or the model is dense.
        FormatError: a file is missing, truncated or foreign, or an expert is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_checkpoint(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._shards = _shards(self.path)
        self._open: dict[Path, Any] = {}
        self._shard_of: dict[str, Path] = {}
        for shard in self._shards:
            self._shard_of.update(dict.fromkeys(self._opened(shard).keys(), shard))
        self._stems: dict[int, str] = {}
        self._find_experts()

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def num_hidden_layers(self) -> int:
        try:
            return int(self.config["num_hidden_layers"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.path / 'config.json'} does not say how many layers the model has") from error

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence ids: generation_config.json first, then config.json."""
        path = self.path / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        ids = generation.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    def _find_experts(self) -> None:
        found: dict[int, set[int]] = {}
        depth = self.num_hidden_layers
        for name in self._shard_of:
            match = _EXPERT.match(name)
            if match is None or int(match["layer"]) >= depth:  # beyond: heads for several tokens at once
                continue
            layer = int(match["layer"])
            self._stems[layer] = match["stem"]
            experts = found.setdefault(layer, set())
            experts.update([int(match["expert"])] if match["fused"] is None else range(self._shape(name)[0]))
        if not found:
            self._explain_no_experts()
        self.layer_ids = np.array(sorted(found))
        self.experts_per_layer = np.array([self._count_experts(layer, found[layer]) for layer in self.layer_ids])

    def _explain_no_experts(self) -> None:
        foreign = next((name for name in self._shard_of if _ANY_EXPERT.search(name)), None)
        if foreign is not None:
            raise FormatError(
                f"{self.path} stores its experts in a form that is not supported ({foreign}): quantised experts must "
                "be converted to plain tensors first"
            )
        raise InputError(f"{self.path} is a dense model ({self.model_type}): it has no experts to place")

    def _count_experts(self, layer: int, experts: set[int]) -> int:
        stated = next((int(self.config[key]) for key in _EXPERT_COUNTS if self.config.get(key)), None)
        count = max(experts) + 1 if stated is None else stated
        if experts != set(range(count)):
            wrong = min(set(range(count)) ^ experts)
            what = "lacks" if wrong < count else "has the superfluous"
            raise FormatError(f"{self.path} {what} expert {wrong} of decoder layer {layer}; its layers have {count}")
        for name in self._expert_names(self._stems[layer], count):
            if name not in self._shard_of:
                raise FormatError(f"{self.path} lacks the tensor {name}")
        return count

    def _expert_names(self, stem: str, count: int) -> list[str]:
        if f"{stem}.gate_up_proj" in self._shard_of:
            biases = ["gate_up_proj_bias", "down_proj_bias"] if f"{stem}.gate_up_proj_bias" in self._shard_of else []
            return [f"{stem}.{part}" for part in ("gate_up_proj", "down_proj", *biases)]
        parts = _NAMES[stem.split(".")[-2]]
        return [f"{stem}.{expert}.{part}.weight" for expert in range(count) for part in parts]

    @property
    def num_layers(self) -> int:
        """L: MoE layers."""
        return len(self.layer_ids)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration, of every tensor's name, type and shape, and of samples of the values."""
        content = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self._shards:
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
        for name in self._shard_of:
            if not _ANY_EXPERT.search(name):
                yield name

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        return self._file(name).get_tensor(name)

    def expert_shape(self) -> tuple[int, int]:
        """(D, H) of the experts."""
        parts = self.expert(0, 0)
        return parts["down"].shape[0], parts["down"].shape[1]

    def expert(self, layer: int, expert: int) -> dict[Part, torch.Tensor]:
        """The parts of one expert, in the runtime's layout; nothing else is read.

        Args:
            layer: MoE layer, 0 .. L-1.
            expert: 0 .. E-1.

        Returns:
            gate_up (2H, D), down (D, H), and where the model has them gate_up_bias (2H,), down_bias (D,).
        """
        stem = self._stems[int(self.layer_ids[layer])]
        if f"{stem}.gate_up_proj" in self._shard_of:
            return self._fused_expert(stem, expert)
        gate, up, down = (self.tensor(f"{stem}.{expert}.{part}.weight") for part in _NAMES[stem.split(".")[-2]])
        return {"gate_up": torch.cat([gate, up]), "down": down}

    def _fused_expert(self, stem: str, expert: int) -> dict[Part, torch.Tensor]:
        parts: dict[Part, torch.Tensor] = {
            "gate_up": self._row(f"{stem}.gate_up_proj", expert),
            "down": self._row(f"{stem}.down_proj", expert),
        }
        if f"{stem}.gate_up_proj_bias" in self._shard_of:
            parts["gate_up_bias"] = self._row(f"{stem}.gate_up_proj_bias", expert)
            parts["down_bias"] = self._row(f"{stem}.down_proj_bias", expert)
        if self.model_type not in _INTERLEAVED:
            return parts
        parts["gate_up"], parts["down"] = parts["gate_up"].t(), parts["down"].t()
        for part in ("gate_up", "gate_up_bias"):
            parts[part] = torch.cat([parts[part][::2], parts[part][1::2]])  # type: ignore[index]
        return parts

    def _row(self, name: str, row: int) -> torch.Tensor:
        return self._file(name).get_slice(name)[row]

    def _shape(self, name: str) -> list[int]:
        return list(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        shard = self._shard_of.get(name)
        if shard is None:
            raise FormatError(f"{self.path} lacks the tensor {name}")
        return self._opened(shard)

    def _opened(self, shard: Path) -> Any:
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(shard, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{shard} is not a safetensors file: {error}") from error
        return self._open[shard]


def _shards(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _describe(experts_per_layer: np.ndarray) -> str:
    counts = sorted({int(count) for count in experts_per_layer})
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(experts_per_layer)} MoE layers of {experts} experts"
