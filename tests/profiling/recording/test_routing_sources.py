"""Where routing is found: by what modules take and return, wherever they are and whatever they are called."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.experts_modules import find_experts
from moeplace.profiling.recording.recorder import Recorder, merge_repeats
from moeplace.profiling.recording.routing_sources import find_sources
from moeplace.profiling.traces.file import load_trace

EXPERTS, TOP_K, WIDTH = 6, 2, 8


class Experts(nn.Module):
    """Takes hidden rows, ids and weights."""

    def __init__(self, experts: int = EXPERTS, null: int = 0) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 6, WIDTH))
        self.down_proj = nn.Parameter(torch.zeros(experts, WIDTH, 3))
        self.zero_expert_num = null
        self.seen: list[np.ndarray] = []

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids.reshape(-1, ids.shape[-1]).numpy().copy())
        return torch.zeros_like(hidden)


class UntoldExperts(nn.Module):
    """Takes rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 6, WIDTH))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class Router(nn.Module):
    """Its weight is not its own: a classifier inside holds it."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, experts, bias=False)
        self.top_k = TOP_K

    def forward(self, x: torch.Tensor) -> Any:
        return self.classifier(x)


class PairRouter(Router):
    """Returns its decision, the weights last."""

    def forward(self, x: torch.Tensor) -> Any:
        weights, ids = super().forward(x).softmax(1).topk(TOP_K)
        return ids, weights


class Block(nn.Module):
    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.router(x)
        if not isinstance(self.experts, Experts):
            return self.experts(x)
        ids, weights = out if isinstance(out, tuple) else out.topk(TOP_K)[::-1]
        return self.experts(x, ids, weights)


class Model(nn.Module):
    """Layers called `blocks`, the first of them dense."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(name_or_path="stand-in", model_type="stand-in", num_hidden_layers=1 + len(parts))
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), *parts])

    def forward(self, input_ids: torch.Tensor) -> None:
        x = self.embed(input_ids).flatten(0, 1)
        for block in self.blocks:
            x = x + block(x)


def record(model: Model, path: Path) -> Any:
    with torch.no_grad(), Recorder(model, path):
        model(torch.arange(14).reshape(2, 7))
    return load_trace(path)


def test_told_experts_say_what_they_receive(tmp_path: Path, dated_seed: int) -> None:
    """Ids as executed; a router without a weight of its own, in layers that are not called layers."""
    torch.manual_seed(dated_seed)
    experts = [Experts(), Experts()]
    trace = record(Model(Block(Router(), experts[0]), Block(PairRouter(), experts[1])), tmp_path / "t")
    assert trace.layer_ids.tolist() == [1, 2]
    assert (trace.experts_per_layer.tolist(), trace.hidden_size) == ([EXPERTS, EXPERTS], WIDTH)
    for layer, module in enumerate(experts):
        assert np.array_equal(np.sort(trace.topk_ids[:, layer]), np.sort(module.seen[0]))


def test_untold_experts_leave_it_to_the_router(tmp_path: Path, dated_seed: int) -> None:
    """By the whole numbers that the router returns, else by the greatest of its scores."""
    torch.manual_seed(dated_seed)
    blocks = [Block(Router(), UntoldExperts()), Block(PairRouter(), UntoldExperts())]
    model, seen = Model(*blocks), []
    for block in blocks:
        block.router.classifier.register_forward_hook(lambda _m, _i, out: seen.append(out.topk(TOP_K)[1].numpy()))
    trace = record(model, tmp_path / "t")
    for layer, ids in enumerate(seen):
        assert np.array_equal(np.sort(trace.topk_ids[:, layer]), np.sort(ids))


def test_zero_computation_experts_are_null_experts(tmp_path: Path) -> None:
    """Ids beyond the experts with weights stay in the trace, and count as null experts."""
    torch.manual_seed(2)
    experts = Experts(null=3)
    trace = record(Model(Block(Router(EXPERTS + 3), experts)), tmp_path / "t")
    assert (trace.experts_per_layer.tolist(), trace.null_experts) == ([EXPERTS], 3)
    assert np.array_equal(np.sort(trace.topk_ids[:, 0]), np.sort(experts.seen[0]))
    assert (trace.topk_ids >= EXPERTS).any()


def test_shared_experts_are_not_routed_ones() -> None:
    """A stack of experts that is told nothing, beside one that is, is the shared part."""
    block = Block(Router(), Experts())
    block.shared_experts = UntoldExperts()
    assert [experts.name for experts in find_experts(Model(block))] == ["blocks.1.experts"]


def test_experts_are_never_called_dense() -> None:
    """Where nothing shows the routing, the sentence says so and names the module; only without experts it is dense."""
    block = Block(Router(), UntoldExperts())
    del block.router
    with pytest.raises(InputError, match=r"routing of blocks\.1\.experts \(UntoldExperts\) cannot be recorded"):
        find_sources(Model(block))
    assert find_sources(Model(nn.Linear(WIDTH, WIDTH))) == []


def test_repeated_experts_are_merged() -> None:
    """A token that names an expert twice has it once, with both weights; others stay as they are."""
    ids = np.array([[[3, 3, 1]], [[0, 1, 2]], [[5, -1, -1]]], np.int16)
    weights = np.array([[[0.3, 0.2, 0.4]], [[0.5, 0.3, 0.2]], [[1.0, 0, 0]]], np.float32)
    merged, sums = merge_repeats(ids, weights)
    assert merged.tolist() == [[[3, 1, -1]], [[0, 1, 2]], [[5, -1, -1]]]
    np.testing.assert_allclose(sums[0, 0], [0.5, 0.4, 0], atol=1e-6)
