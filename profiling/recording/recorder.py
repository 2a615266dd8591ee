"""Records the routing of a Hugging Face MoE model: a forward hook on every router.

The router modules of OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3 and GPT-OSS return the tuple
(logits (T, E), weights (T, K), ids (T, K)). A hook keeps references only; after a pass, ids and weights are put into
one narrow array each, where they are. Copying them to the host, sorting, checking and writing wait until many tokens
have gathered, so a pass on a GPU is never waited for, and memory does not grow with the corpus.

Shape letters: T tokens of a pass, L MoE layers, E experts per layer, K top-k, D hidden size.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.cache_names import cache_of
from moeplace.profiling.recording.gate_accuracy import GateAccuracy
from moeplace.profiling.traces.file import TraceWriter

_ROUTER_NAMES = ("gate", "router")
_PIECE_TOKENS = 1 << 14  # appended to the file at once
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class _Pass(NamedTuple):
    """What is kept of a forward pass until it is written."""

    ids: torch.Tensor  # (T, L, K) int16 or int32, padding included, on the model's device
    weights: torch.Tensor  # (T, L, K), in the model's number type
    keep: torch.Tensor | None  # (T,) bool, False for padding; None = all
    rows: np.ndarray  # (B,) sequence of each row of the batch
    length: int  # tokens of a row
    cached: int  # tokens of a row that came before
    workload: int


class Router(NamedTuple):
    """One router of a model and what belongs to it."""

    layer_id: int  # decoder-layer index
    module: torch.nn.Module
    num_experts: int
    hidden_size: int
    expert_bytes: int


def find_routers(model: torch.nn.Module) -> list[Router]:
    """The routers of a model in layer order: modules called gate or router that have `experts` beside them."""
    routers = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        layer = _LAYER.search(name + ".")
        gates = [children[n] for n in _ROUTER_NAMES if n in children]
        if layer is None or "experts" not in children or not gates:
            continue
        weight = dict(gates[0].named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim != 2:
            continue
        experts, hidden = weight.shape
        held = sum(p.numel() * p.element_size() for p in children["experts"].parameters())
        routers.append(Router(int(layer.group(1)), gates[0], experts, hidden, held // experts))
    return sorted(routers, key=lambda router: router.layer_id)


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
        gate_accuracy: also measure cross-layer gate accuracy (more computation per pass).

    Raises:
        InputError: the model has no MoE router, or its routers do not report their decision.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        path: str | Path,
        *,
        workload_names: Sequence[str] = (),
        name: str = "",
        gate_accuracy: bool = False,
    ) -> None:
        self._model = model
        self._path = Path(path)
        self._routers = find_routers(model)
        config: Any = model.config
        self._name = name or str(config.name_or_path or config.model_type)
        if not self._routers:
            raise InputError(f"{self._name} is a dense model ({type(model).__name__}): it has no MoE router to record")
        self.workload = 0
        self._workload_names = tuple(workload_names)
        self._hidden_layers = int(config.num_hidden_layers)
        self._measure_gates = gate_accuracy
        self._gates: GateAccuracy | None = None
        self._outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._predictions: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gate_input: torch.Tensor | None = None
        self._nested = False
        self._cached = 0
        self._rows_B = np.zeros(0, dtype=np.int64)
        self._next_sequence = 0
        self._writer: TraceWriter | None = None
        self._pending: list[_Pass] = []
        self._pending_tokens = 0
        self._id_dtype = torch.int16 if max(r.num_experts for r in self._routers) < 2**15 else torch.int32
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if not self._path.parent.is_dir():
            raise InputError(f"cannot write {self._path}: the folder {self._path.parent} does not exist")
        for index, router in enumerate(self._routers):
            self._handles.append(router.module.register_forward_hook(self._router_hook(index)))
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

    def _router_hook(self, index: int) -> Any:
        router = self._routers[index]

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if self._nested:
                return
            if not isinstance(output, tuple) or len(output) != 3:
                raise InputError(
                    f"the router of layer {router.layer_id} ({type(module).__name__}) must return "
                    f"(logits, weights, ids), not {type(output).__name__}: its model is not supported"
                )
            self._outputs[index] = (output[2].detach(), output[1].detach())
            if self._measure_gates:
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
        self._outputs.clear()
        self._gate_input = None
        cache = cache_of(_named(module, args, kwargs))
        self._cached = int(cache.get_seq_length()) if cache is not None else 0

    def _after_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _named(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or len(self._outputs) != len(self._routers):
            raise InputError("a forward pass was recorded in part: it must have input_ids and run every MoE layer")
        rows, length = tokens.shape[:2]
        if self._cached == 0 or rows != len(self._rows_B):
            self._rows_B = self._next_sequence + np.arange(rows)
            self._next_sequence += rows
        keep = _kept(given.get("attention_mask"), length)
        layers = range(len(self._routers))
        ids = torch.stack([self._outputs[i][0].to(self._id_dtype) for i in layers], dim=1)
        weights = torch.stack([self._outputs[i][1] for i in layers], dim=1)
        self._outputs.clear()
        if self._measure_gates:
            self._count_gates(keep, ids)
        self._pending.append(_Pass(ids, weights, keep, self._rows_B, length, self._cached, self.workload))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= _PIECE_TOKENS:
            self._flush()

    def _flush(self) -> None:
        """Move what waits to the file; in large pieces, because each has a fixed cost."""
        passes, self._pending, self._pending_tokens = self._pending, [], 0
        ids_TLK = torch.cat([p.ids for p in passes]).cpu().numpy()
        weights_TLK = torch.cat([p.weights for p in passes]).to(torch.float32).cpu().numpy()
        ids_TLK, weights_TLK = sort_by_weight(ids_TLK, weights_TLK)
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
            experts = min(router.num_experts for router in self._routers)
            layer_ids = [router.layer_id for router in self._routers]
            self._gates = GateAccuracy(layer_ids, top_k=ids.shape[2], num_experts=experts)
        keep_T = slice(None) if keep is None else keep.cpu().numpy()
        ids_TLK = ids.cpu().numpy()
        for index, (chosen, scores) in self._predictions.items():
            chosen_TK = chosen.cpu().numpy()[keep_T]
            self._gates.add(index - 1, ids_TLK[keep_T, index], chosen_TK, scores.float().cpu().numpy()[keep_T])
        self._predictions.clear()

    def _open(self, top_k: int) -> TraceWriter:
        if self._writer is None:
            self._writer = TraceWriter(
                self._path,
                experts_per_layer=np.array([router.num_experts for router in self._routers]),
                top_k=top_k,
                model=self._name,
                layer_ids=np.array([router.layer_id for router in self._routers]),
                num_hidden_layers=self._hidden_layers,
                expert_bytes=np.array([router.expert_bytes for router in self._routers]),
                hidden_size=self._routers[0].hidden_size,
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


def sort_by_weight(ids_TLK: np.ndarray, weights_TLK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays with the experts of every token in falling order of weight; ties stay as they are."""
    if (weights_TLK[..., 1:] <= weights_TLK[..., :-1]).all():
        return ids_TLK, weights_TLK
    order = np.argsort(-weights_TLK, axis=2, kind="stable")
    return np.take_along_axis(ids_TLK, order, axis=2), np.take_along_axis(weights_TLK, order, axis=2)
