"""Local experts: both forms of the computation against a loop, and storage rows that change under the slots."""

import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.grouped import grouped_linear, looped_linear, padded_linear
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights, gated_silu

LAYERS, SLOTS, STAGING, HIDDEN, EXPERT_HIDDEN = 2, 4, 2, 8, 6


def make_store(dtype: torch.dtype, *, bias: bool, device: str = "cpu") -> ExpertStore:
    generator = torch.Generator().manual_seed(0)
    weights = []
    for _ in range(LAYERS):
        layer = ExpertWeights.empty(SLOTS + STAGING, HIDDEN, EXPERT_HIDDEN, bias=bias, dtype=dtype, device=device)
        for tensor in layer.parts().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        weights.append(layer)
    return ExpertStore(weights, slots=SLOTS)


def compute_slowly(
    store: ExpertStore, layer: int, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """One assignment at a time."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for slot, weight in zip(slots[row].tolist(), weights[row], strict=True):
            if slot >= 0:
                parts = store.read(layer, slot)
                hidden = parts["gate_up"] @ x[row] + parts.get("gate_up_bias", 0)
                out[row] += weight * (parts["down"] @ gated_silu(hidden) + parts.get("down_bias", 0))
    return out


def check_computation(device: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, top_k, bias, low in (
        (9, 1, False, 0),
        (9, 3, True, -1),
        (1, 2, True, 0),
        (0, 2, False, 0),
        (5, 2, False, -9),
    ):
        store = make_store(dtype, bias=bias, device=device)
        store.commit(1, {0: SLOTS, 2: 0})
        x = torch.randn(rows, HIDDEN, generator=generator).to(device, dtype)
        slots = torch.randint(low, SLOTS, (rows, top_k), generator=generator).clamp(min=-1).to(device)
        weights = torch.rand(rows, top_k, generator=generator).to(device, dtype)
        expected = compute_slowly(store, 1, x, slots, weights)
        computation = ExpertComputation(store, counters=Counters())
        for method in (computation.compute, computation._compute_all):
            torch.testing.assert_close(method(1, x, slots, weights), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_computation_equals_a_loop(dtype: torch.dtype, tolerance: float) -> None:
    """Top-1 and top-k, biases, absent slots, no rows; the form for the CPU and the one for GPUs."""
    check_computation("cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_computation_equals_a_loop_on_a_gpu() -> None:
    """The same on CUDA, in the type that grouped products support there."""
    check_computation("cuda", torch.bfloat16, 5e-2)


def test_grouped_and_looped_products_agree() -> None:
    """One product per group, empty groups included."""
    x, weight = torch.randn(12, 8), torch.randn(5, 6, 8)
    ends = torch.tensor([3, 3, 7, 12, 12], dtype=torch.int32)
    torch.testing.assert_close(grouped_linear(x, weight, ends), looped_linear(x, weight, ends))


@pytest.mark.parametrize("counts", [(2, 0, 1, 3, 2), (1, 1, 1, 1, 1), (0, 0, 0, 9, 0), (40, 1, 1, 1, 1), (0,) * 5])
def test_few_rows_of_a_16_bit_type_give_the_same(counts: tuple[int, ...]) -> None:
    """Padded or not, each group's rows meet the group's matrix."""
    x, weight = torch.randn(sum(counts), 16).bfloat16(), torch.randn(5, 8, 16).bfloat16()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    expected = looped_linear(x.double(), weight.double(), ends)
    torch.testing.assert_close(grouped_linear(x, weight, ends).double(), expected, rtol=2e-2, atol=5e-2)
    if sum(counts):
        padded = padded_linear(x, weight, torch.tensor(counts), max(counts))
        torch.testing.assert_close(padded.double(), expected, rtol=2e-2, atol=5e-2)


def test_commit_changes_slots_and_no_storage() -> None:
    """Staging rows become slots; the rows they replace become staging."""
    store = make_store(torch.float32, bias=False)
    assert store.row_of_slot[0].tolist() == [0, 1, 2, 3]
    store.write(0, 4, "down", torch.ones(HIDDEN, EXPERT_HIDDEN))
    before = store.read(0, 1)["down"].clone()
    store.commit(0, {1: 4})
    assert (store.read(0, 1)["down"] == 1).all()
    assert store.row_of_slot.tolist() == [[0, 4, 2, 3], [0, 1, 2, 3]]
    store.commit(0, {1: 1})
    torch.testing.assert_close(store.read(0, 1)["down"], before)


def test_misuse_is_refused() -> None:
    """Two slots in one row, a part of another shape, fewer rows than slots."""
    store = make_store(torch.float32, bias=False)
    with pytest.raises(InputError, match="would share a storage row"):
        store.commit(0, {1: 0})
    with pytest.raises(InputError, match=r"down of an expert has shape \(2, 2\), not \(8, 6\)"):
        store.write(0, 0, "down", torch.ones(2, 2))
    with pytest.raises(InputError, match="at least its 9 slots"):
        ExpertStore(store.weights, slots=9)


def test_counts() -> None:
    """Assignments and activated experts per layer."""
    counters = Counters()
    computation = ExpertComputation(make_store(torch.float32, bias=False), counters=counters)
    slots = torch.tensor([[0, 1], [0, -1], [0, 3]])
    computation.compute(1, torch.zeros(3, HIDDEN), slots, torch.ones(3, 2))
    assert (counters.tokens[1], counters.activated[1], counters.tokens[0]) == (5, 3, 0)
