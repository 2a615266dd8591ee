"""Records the routing of a Hugging Face MoE model: a hook where each MoE layer shows it (see `routing_sources`).

A hook keeps references only; after a pass, ids and weights are put into one narrow array each, where they are. Copying
them to the host, sorting, checking and writing wait until many tokens have gathered, so a pass on a GPU is never waited
for, and memory does not grow with the corpus.

Shape letters: T tokens of a pass, L MoE layers, E experts per layer, K top-k, D hidden size.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from moeplace.profiling.errors import InputError
from moeplace.profiling.model_facts import facts_of
from moeplace.profiling.recording.cache_names import cache_of
from moeplace.profiling.recording.gate_accuracy import GateAccuracy
from moeplace.profiling.recording.model_config import no_experts
from moeplace.profiling.recording.routing_sources import Routing, RoutingSource, find_sources
from moeplace.profiling.traces.file import TraceWriter

_GATE_NAMES = ("gate", "router")
_PIECE_TOKENS = 1 << 14  # appended to the file at once


class _Pass(NamedTuple):
    """What is kept of a forward pass until it is written."""

    ids: torch.Tensor  # (T, L, K) int16 or int32, padding included, on the model's device
    weights: torch.Tensor  # (T, L, K), in the model's number type
    keep: torch.Tensor | None  # (T,) bool, False for padding; None = all
    rows: np.ndarray  # (B,) sequence of each row of the batch
    length: int  # tokens of a row
    cached: int  # tokens of a row that came before
    workload: int


def find_gates(sources: Sequence[RoutingSource]) -> list[torch.nn.Module]:
    """Routers that can be asked about any input: modules called gate or router beside the experts of each layer.

    Raises:
        InputError: a layer has none.
    """
    gates = []
    for source in sources:
        children = dict(source.experts.parent.named_children())
        gate = next((children[name] for name in _GATE_NAMES if name in children), None)
        if gate is None:
            raise InputError(f"decoder layer {source.experts.layer_id} has no gate whose accuracy could be measured")
        gates.append(gate)
    return gates


class Recorder:
    """Records every forward pass of `model` inside the `with` block into a trace file.

        with Recorder(model, "run.trace") as recorder:
            model.generate(**inputs)

    Every row of a batch is a sequence. A pass that continues a KV cache of the same number of rows continues their
    sequences and is marked `is_decode`. Padding (attention mask 0) is left out. The file appears when the block ends
    well. Set `workload` to an index into `workload_names` before a pass to tag its tokens.

    Args:
        model: a Hugging Face causal language model with MoE layers, on any device.
        path: the trace file to write.
        workload_names: tags for `workload`.
        name: name of the model in the trace; by default that of its configuration.
        expert_bytes: (L,) bytes of an expert where they are not those of the model, which may be an unpacked one.
        gate_accuracy: also measure cross-layer gate accuracy (more computation per pass).

    Raises:
        InputError: the model is dense, or nothing in it shows how tokens are routed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        path: str | Path,
        *,
        workload_names: Sequence[str] = (),
        name: str = "",
        expert_bytes: np.ndarray | None = None,
        gate_accuracy: bool = False,
    ) -> None:
        self._model = model
        self._path = Path(path)
        self._sources = find_sources(model)
        config: Any = model.config
        self._name = name or str(config.name_or_path or config.model_type)
        if not self._sources:
            raise no_experts(self._name, model)
        self._gate_modules = find_gates(self._sources) if gate_accuracy else []
        self.workload = 0
        self._workload_names = tuple(workload_names)
        text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        stated = int(getattr(text, "num_hidden_layers", 0))
        self._hidden_layers = max(stated, self._sources[-1].experts.layer_id + 1)
        self._facts = facts_of(config.to_dict() if hasattr(config, "to_dict") else vars(config))
        self._expert_bytes = expert_bytes
        self._measure_gates = gate_accuracy
        self._gates: GateAccuracy | None = None
        self._seen: dict[int, Routing] = {}
        self._predictions: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gate_input: torch.Tensor | None = None
        self._nested = False
        self._width = 0
        self._cached = 0
        self._rows_B = np.zeros(0, dtype=np.int64)
        self._next_sequence = 0
        self._writer: TraceWriter | None = None
        self._pending: list[_Pass] = []
        self._pending_tokens = 0
        self._nulls = max(source.experts.num_null for source in self._sources)
        most = max(source.experts.num_experts for source in self._sources) + self._nulls
        self._id_dtype = torch.int16 if most < 2**15 else torch.int32
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if not self._path.parent.is_dir():
            raise InputError(f"cannot write {self._path}: the folder {self._path.parent} does not exist")
        for index, source in enumerate(self._sources):
            self._handles.append(source.attach(self._noting(index)))
        for index, gate in enumerate(self._gate_modules):
            self._handles.append(gate.register_forward_hook(self._gate_hook(index)))
        self._handles.append(self._model.register_forward_pre_hook(self._before_pass, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(self._after_pass, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None and self._pending:
            self._flush()
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
        elif kind is None:
            raise InputError(f"no forward pass was recorded, so {self._path} is not written")

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far."""
        waiting = sum(len(p.ids) if p.keep is None else int(p.keep.sum()) for p in self._pending)
        return (self._writer.num_tokens if self._writer else 0) + waiting

    @property
    def gate_accuracy(self) -> GateAccuracy | None:
        """The measurement asked for with `gate_accuracy=True`, once a pass was recorded."""
        return self._gates

    def _noting(self, index: int) -> Any:
        def note(routing: Routing) -> None:
            if index in self._seen:
                layer = self._sources[index].experts.layer_id
                raise InputError(f"decoder layer {layer} runs several times in a pass: its routing cannot be recorded")
            self._seen[index] = routing

        return note

    def _gate_hook(self, index: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if self._nested:
                return
            if not isinstance(output, tuple) or len(output) != 3:
                raise InputError(
                    f"the gate of decoder layer {self._sources[index].experts.layer_id} ({type(module).__name__}) must "
                    f"return (logits, weights, ids) for its accuracy to be measured, not {type(output).__name__}"
                )
            self._predict(index, module, inputs[0].detach())

        return hook

    def _predict(self, index: int, module: torch.nn.Module, gate_input: torch.Tensor) -> None:
        """Feed the input of the gate before to this gate."""
        if index > 0 and self._gate_input is not None:
            self._nested = True
            try:
                with torch.no_grad():
                    logits, _, ids = module(self._gate_input)
            finally:
                self._nested = False
            bias = dict(module.named_buffers(recurse=False)).get("e_score_correction_bias")
            self._predictions[index] = (ids, logits if bias is None else logits.sigmoid() + bias)
        self._gate_input = gate_input

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen.clear()
        self._gate_input = None
        cache = cache_of(_named(module, args, kwargs))
        self._cached = int(cache.get_seq_length()) if cache is not None else 0

    def _after_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _named(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or len(self._seen) != len(self._sources):
            raise InputError("a forward pass was recorded in part: it must have input_ids and run every MoE layer")
        rows, length = tokens.shape[:2]
        if self._cached == 0 or rows != len(self._rows_B):
            self._rows_B = self._next_sequence + np.arange(rows)
            self._next_sequence += rows
        keep = _kept(given.get("attention_mask"), length)
        ids, weights = self._stack()
        self._seen.clear()
        if self._measure_gates:
            self._count_gates(keep, ids)
        self._pending.append(_Pass(ids, weights, keep, self._rows_B, length, self._cached, self.workload))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= _PIECE_TOKENS:
            self._flush()

    def _stack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, L, K) ids and weights of the pass; layers with fewer experts per token are filled up with none."""
        passes = [self._seen[index] for index in range(len(self._sources))]
        self._width = passes[0].width
        top_k = max(routing.ids.shape[1] for routing in passes)
        ids, weights = [], []
        for source, routing in zip(self._sources, passes, strict=True):
            beyond = source.experts.num_experts + source.experts.num_null
            known = routing.ids.masked_fill(routing.ids >= beyond, -1)  # the id after the last says "no expert"
            room = (0, top_k - known.shape[1])
            ids.append(torch.nn.functional.pad(known.to(self._id_dtype), room, value=-1))
            weights.append(torch.nn.functional.pad(routing.weights, room))
        return torch.stack(ids, dim=1), torch.stack(weights, dim=1)

    def _flush(self) -> None:
        """Move what waits to the file; in large pieces, because each has a fixed cost."""
        passes, self._pending, self._pending_tokens = self._pending, [], 0
        ids_TLK = torch.cat([p.ids for p in passes]).cpu().numpy()
        weights_TLK = torch.cat([p.weights for p in passes]).to(torch.float32).cpu().numpy()
        ids_TLK, weights_TLK = sort_by_weight(ids_TLK, weights_TLK)
        ids_TLK, weights_TLK = merge_repeats(ids_TLK, weights_TLK)
        lengths = [len(p.ids) for p in passes]
        arrays = {
            "topk_weights": weights_TLK,
            "sequence_ids": np.concatenate([np.repeat(p.rows, p.length) for p in passes]),
            "positions": np.concatenate([np.tile(p.cached + np.arange(p.length), len(p.rows)) for p in passes]),
            "is_decode": np.repeat([p.cached > 0 for p in passes], lengths),
        }
        if self._workload_names:
            arrays["workload"] = np.repeat([p.workload for p in passes], lengths)
        if any(p.keep is not None for p in passes):
            keep_T = np.concatenate(
                [np.ones(len(p.ids), bool) if p.keep is None else p.keep.cpu().numpy() for p in passes]
            )
            ids_TLK, arrays = ids_TLK[keep_T], {name: array[keep_T] for name, array in arrays.items()}
        if len(ids_TLK):
            self._open(ids_TLK.shape[2]).append(ids_TLK, **arrays)

    def _count_gates(self, keep: torch.Tensor | None, ids: torch.Tensor) -> None:
        if self._gates is None:
            experts = min(source.experts.num_experts for source in self._sources)
            layer_ids = [source.experts.layer_id for source in self._sources]
            self._gates = GateAccuracy(layer_ids, top_k=ids.shape[2], num_experts=experts)
        keep_T = slice(None) if keep is None else keep.cpu().numpy()
        ids_TLK = ids.cpu().numpy()
        for index, (chosen, scores) in self._predictions.items():
            chosen_TK = chosen.cpu().numpy()[keep_T]
            self._gates.add(index - 1, ids_TLK[keep_T, index], chosen_TK, scores.float().cpu().numpy()[keep_T])
        self._predictions.clear()

    def _bytes_of_experts(self) -> np.ndarray:
        if self._expert_bytes is not None:
            return self._expert_bytes
        return np.array([source.experts.expert_bytes for source in self._sources])

    def _open(self, top_k: int) -> TraceWriter:
        if self._writer is None:
            self._writer = TraceWriter(
                self._path,
                experts_per_layer=np.array([source.experts.num_experts for source in self._sources]),
                top_k=top_k,
                model=self._name,
                layer_ids=np.array([source.experts.layer_id for source in self._sources]),
                num_hidden_layers=self._hidden_layers,
                expert_bytes=self._bytes_of_experts(),
                hidden_size=self._width,
                null_experts=self._nulls,
                kv_dim=self._facts.kv_dim,
                shared_experts=self._facts.shared_experts,
                workload_names=self._workload_names,
            ).__enter__()
        return self._writer


def _named(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a pass by name, those given by position too."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _kept(mask: Any, length: int) -> torch.Tensor | None:
    """(T,) bool, False for padding, where the mask is; None where there is no mask."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return mask[:, -length:].reshape(-1).to(torch.bool, copy=True)


def merge_repeats(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays with an expert that a token has twice in a layer once, with both weights; the repeat is none.

    A table from token to experts (hash routing) may name an expert twice; the token still goes to it once.
    """
    ordered = np.sort(ids_TLK, axis=2)
    if not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        return ids_TLK, weights_TLK
    ids_TLK, weights_TLK = ids_TLK.copy(), weights_TLK.copy()
    for later in range(1, ids_TLK.shape[2]):
        for first in range(later):
            repeat_TL = (ids_TLK[..., later] == ids_TLK[..., first]) & (ids_TLK[..., later] >= 0)
            weights_TLK[..., first] += np.where(repeat_TL, weights_TLK[..., later], 0)
            weights_TLK[..., later][repeat_TL] = 0
            ids_TLK[..., later][repeat_TL] = -1
    return sort_by_weight(ids_TLK, weights_TLK)


def sort_by_weight(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays with the experts of every token in falling order of weight; ties stay as they are."""
    if (weights_TLK[..., 1:] <= weights_TLK[..., :-1]).all():
        return ids_TLK, weights_TLK
    order = np.argsort(-weights_TLK, axis=2, kind="stable")
    return np.take_along_axis(ids_TLK, order, axis=2), np.take_along_axis(weights_TLK, order, axis=2)
