"""The K/V cache under every name that `transformers` has given it, whatever release is installed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moeplace.profiling.recording.cache_names import CACHE_NAMES, cache_keyword, cache_of
from moeplace.profiling.recording.recorder import Recorder
from moeplace.profiling.traces.file import load_trace


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x @ self.weight.T
        return logits, *logits.topk(2)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = _Gate(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate(x.flatten(0, 1))
        return x


class _Model(nn.Module):
    """One MoE layer; subclasses take the cache by one of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(name_or_path="stand-in", model_type="stand-in", num_hidden_layers=1)
        self.layers = nn.ModuleList([_Block()])

    def run(self, input_ids: torch.Tensor) -> None:
        self.layers[0](nn.functional.one_hot(input_ids, 8).float())


class _NewName(_Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, cache: Any = None) -> None:
        self.run(input_ids)


class _OldName(_Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None) -> None:
        self.run(input_ids)


class _RecurrentName(_Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, cache_params: Any = None) -> None:
        self.run(input_ids)


class _AnyName(_Model):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> None:
        self.run(input_ids)


class _Cache:
    def get_seq_length(self) -> int:
        return 3


MODELS = {"cache": _NewName, "past_key_values": _OldName, "cache_params": _RecurrentName}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
NEXT = torch.tensor([[7], [0]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])


def recorded(model: _Model, path: Path, *args: Any, **kwargs: Any) -> list[list[Any]]:
    """Sequences, positions and decode marks of a prompt and one step after it."""
    with Recorder(model, path):
        model(TOKENS)
        model(*args, **kwargs)
    trace = load_trace(path)
    return [trace.sequence_ids.tolist(), trace.positions.tolist(), trace.is_decode.tolist()]  # type: ignore[union-attr]


CONTINUED = [[0, 0, 0, 1, 1, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3, 3], [False] * 6 + [True] * 2]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_continues_sequences_by_any_name(name: str, tmp_path: Path) -> None:
    """As a keyword, by position, through `**kwargs`, and beside another name that holds nothing."""
    assert recorded(MODELS[name](), tmp_path / "keyword", NEXT, **{name: _Cache()}) == CONTINUED
    assert recorded(MODELS[name](), tmp_path / "position", NEXT, MASK, _Cache()) == CONTINUED
    for other in set(CACHE_NAMES) - {name}:
        assert recorded(_AnyName(), tmp_path / other, NEXT, **{name: _Cache(), other: None}) == CONTINUED


def test_a_mask_by_position_leaves_padding_out(tmp_path: Path) -> None:
    """The same as by keyword."""
    padded = torch.tensor([[1, 1, 1], [0, 1, 1]])
    by_name = recorded(_NewName(), tmp_path / "name", TOKENS, attention_mask=padded)
    assert by_name == recorded(_NewName(), tmp_path / "place", TOKENS, padded)
    assert len(by_name[0]) == 6 + 5


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_keyword_is_what_the_module_takes(name: str) -> None:
    """What a module's own `forward` says; the old name where it says nothing."""
    assert cache_keyword(MODELS[name]().forward) == name
    assert cache_keyword(_AnyName().forward) == "past_key_values"
    assert cache_of({}) is None
    assert cache_of({name: None}) is None
