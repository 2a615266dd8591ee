"""Passes side by side: one exchange per call of the experts for all of them, in a fixed order; no pass left over."""

import threading
from typing import Any

import pytest
import torch

from moeplace.runtime.models.lock_step import TapCall, pause_at_tap, run_in_lock_step

CALLS = [TapCall(layer, 2, 3, torch.float64, torch.float64) for layer in (0, 2, 0)]


def one_pass(rows: int, name: float, layers: tuple[int, ...] = (0, 2, 0)) -> Any:
    """A pass of `rows` tokens that calls the experts of some layers, each time with what came back."""

    def run() -> torch.Tensor:
        x = torch.full((rows, 3), name, dtype=torch.float64)
        for layer in layers:
            ids = torch.full((rows, 2), layer)
            x = x + pause_at_tap(layer, x, ids, torch.ones(rows, 2, dtype=torch.float64))
        return x

    return run


def test_each_call_is_one_exchange_for_all_passes() -> None:
    """Rows come in the order of the passes; answers go back to their own."""
    seen: list[tuple[int, list[float]]] = []

    def double(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((layer, hidden[:, 0].tolist()))
        return hidden

    results = run_in_lock_step(
        [one_pass(2, 1), one_pass(0, 5), one_pass(1, 3)], CALLS, double, device=torch.device("cpu")
    )
    assert seen == [(0, [1, 1, 3]), (2, [2, 2, 6]), (0, [4, 4, 12])]
    assert [result[:, 0].tolist() for result in results] == [[8, 8], [], [24]]


def test_a_rank_without_passes_takes_part_with_no_rows() -> None:
    """Its rows have the width and types that others' have."""
    seen: list[tuple[Any, ...]] = []

    def note(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((layer, tuple(hidden.shape), hidden.dtype, tuple(ids.shape), ids.dtype, weights.dtype))
        return hidden

    assert run_in_lock_step([], CALLS, note, device=torch.device("cpu")) == []
    shape = ((0, 3), torch.float64, (0, 2), torch.int64, torch.float64)
    assert seen == [(layer, *shape) for layer in (0, 2, 0)]


@pytest.mark.parametrize("layers", [(0, 2), (0, 2, 0, 1), (0, 1, 0)])
def test_a_pass_that_calls_other_experts_is_an_error(layers: tuple[int, ...]) -> None:
    """Fewer calls, more, or of another layer: no pass goes on, and no thread stays."""
    before = threading.active_count()
    with pytest.raises(AssertionError, match="MoE layer"):
        run_in_lock_step(
            [one_pass(1, 1), one_pass(1, 1, layers)], CALLS, lambda _l, x, _i, _w: x, device=torch.device("cpu")
        )
    assert threading.active_count() == before


def test_what_breaks_in_a_pass_or_in_an_exchange_comes_out() -> None:
    """The error itself, with all other passes ended."""
    before = threading.active_count()

    def broken() -> torch.Tensor:
        raise ValueError("of the pass")

    with pytest.raises(ValueError, match="of the pass"):
        run_in_lock_step([one_pass(1, 1), broken], CALLS, lambda _l, x, _i, _w: x, device=torch.device("cpu"))

    def lost(*_: Any) -> torch.Tensor:
        raise RuntimeError("of the exchange")

    with pytest.raises(RuntimeError, match="of the exchange"):
        run_in_lock_step([one_pass(1, 1), one_pass(2, 1)], CALLS, lost, device=torch.device("cpu"))
    assert threading.active_count() == before
