"""Local experts: both forms of the computation against a loop, and storage rows that change under the slots."""

import numpy as np
import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.counters import Counters
from moeplace.runtime.experts import weights as weights_module
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.grouped import Groups, grouped_linear, looped_linear, suits_padding
from moeplace.runtime.experts.row_contents import NOTHING, checksums
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
        for method in (computation.compute, computation.compute_fixed):
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
    """One product per group, empty groups included; sizes on the host or ends on the device."""
    x, weight, sizes = torch.randn(12, 8), torch.randn(5, 6, 8), np.array([3, 0, 4, 5, 0])
    expected = torch.cat([x[:3] @ weight[0].T, x[3:7] @ weight[2].T, x[7:] @ weight[3].T])
    ends = torch.tensor([3, 3, 7, 12, 12], dtype=torch.int32)
    for groups in (sizes, ends):
        torch.testing.assert_close(grouped_linear(x, weight, groups), expected)
        torch.testing.assert_close(grouped_linear(x.double(), weight.double(), groups).float(), expected)
    torch.testing.assert_close(looped_linear(x, weight.transpose(1, 2).unbind(0), sizes), expected)


@pytest.mark.parametrize("seed", [1, 2, 3, "today"])
def test_padded_groups_are_the_groups(seed: int | str, dated_seed: int) -> None:
    """Whatever the sizes: every present assignment has a place of its own in its group, and its own row is there."""
    seed = dated_seed if seed == "today" else int(seed)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        count = int(rng.integers(1, 9))
        storage = rng.integers(0, count + int(rng.integers(2)), int(rng.integers(1, 30)))
        groups = Groups.of(storage, count)
        if not groups.present:
            continue
        source, place = groups.padding()
        here = np.flatnonzero(storage < count)
        assert len(set(place[here])) == len(here) == groups.present, seed
        assert (source[place[here]] == here).all(), seed
        assert (place[here] // groups.sizes.max() == storage[here]).all(), seed
        assert len(source) == count * groups.sizes.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("top_k", [1, 3])
def test_padded_and_ordered_forms_agree(dtype: torch.dtype, top_k: int) -> None:
    """For sizes that suit either."""
    generator = torch.Generator().manual_seed(4)
    for rows in (1, 2, 7, 40):
        store = make_store(dtype, bias=top_k > 1)
        computation = ExpertComputation(store, counters=Counters())
        x = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
        slots = torch.randint(0, SLOTS, (rows, top_k), generator=generator)
        groups = Groups.of(store.row_table(0)[slots.numpy().reshape(-1)], SLOTS + STAGING)
        both = (computation._apply_padded, computation._apply_in_order)
        forms = [form(0, x, top_k, groups).double() for form in both]
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(*forms, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("sizes", "shape", "dtype", "suits"),
    [
        ([4] * 16, (128, 96), torch.float32, True),
        ([4] * 16, (4096, 2048), torch.float32, True),  # nothing is padded
        ([5, 3] * 8, (4096, 2048), torch.float32, False),  # reading a matrix once more costs more than a call
        ([60] + [1] * 15, (128, 96), torch.float32, False),
        ([1] * 4 + [0] * 12, (128, 96), torch.float32, False),
        ([4] * 16, (128, 96), torch.bfloat16, True),
        ([20] * 16, (128, 96), torch.bfloat16, False),
        ([4] * 16, (2048, 1024), torch.bfloat16, False),
    ],
)
def test_when_padding_pays(sizes: list[int], shape: tuple[int, int], dtype: torch.dtype, suits: bool) -> None:
    """Where the calls that it saves cost more than the rows that it adds."""
    groups = Groups.of(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    assert suits_padding(groups, torch.empty(len(sizes), *shape, dtype=dtype, device="meta")) is suits


def test_what_is_absent_is_zero_whatever_the_others_are() -> None:
    """A row without experts here stays zero beside one that is no number."""
    computation = ExpertComputation(make_store(torch.float32, bias=False), counters=Counters())
    x = torch.randn(6, HIDDEN)
    x[0] = torch.nan
    slots = torch.tensor([[0], [1], [2], [3], [-1], [0]])
    out = computation.compute(0, x, slots, torch.ones(6, 1))
    assert (out[4] == 0).all()
    assert out[1:].isfinite().all()
    assert out[0].isnan().all()


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


def make_known_store() -> tuple[ExpertStore, dict[tuple[int, int], dict[str, torch.Tensor]]]:
    """A store with two staging rows of which each row holds an expert of its own, and what each has been given."""
    layers = make_store(torch.float32, bias=True).weights
    staging = layers[0].select_rows([0, 1], room=2)
    store = ExpertStore(layers, slots=SLOTS, staging=staging)
    given = {}
    for expert, (layer, row) in enumerate((layer, row) for layer in range(LAYERS) for row in range(SLOTS + STAGING)):
        given[layer, expert] = {part: torch.full_like(value, expert) for part, value in store.read(layer, 0).items()}
        store.load(layer, row, expert, given[layer, expert])
    return store, given


def is_as_given(store: ExpertStore, layer: int, row: int, parts: dict[str, torch.Tensor]) -> bool:
    """Whether a row has the bytes of an expert."""
    wanted = [part.reshape(-1).view(torch.uint8) for part in parts.values()]
    return all(torch.equal(*pair) for pair in zip(store.row_bytes(layer, row), wanted, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(("one", "other"), [(1, 3), (2, SLOTS + STAGING), (SLOTS + STAGING + 1, 0)])
def test_experts_change_places(one: int, other: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes of both rows, in pieces of any size, staging among them; no other row, and no slot."""
    monkeypatch.setattr(weights_module, "_CHUNK", chunk)
    store, given = make_known_store()
    assert store.staging_rows == 2
    for row, expert in ((SLOTS + STAGING, 6), (SLOTS + STAGING + 1, 7)):
        given[1, expert + 10] = {part: torch.full_like(value, expert + 10) for part, value in given[1, 6].items()}
        store.load(1, row, expert + 10, given[1, expert + 10])
    table, experts = store.row_of_slot.clone(), list(store.contents.expert_of_row[1])
    store.exchange(1, one, other)
    experts[one], experts[other] = experts[other], experts[one]
    assert store.contents.expert_of_row[1] == experts
    assert torch.equal(store.row_of_slot, table)
    for row, expert in enumerate(experts):
        assert is_as_given(store, 1, row, given[1, expert])
        assert store.contents.sums[1, row] == checksums(given[1, expert].values())
        assert store.contents.row_of(1, expert) == row


@pytest.mark.parametrize("slots", [1, 3, SLOTS, 6, 9])
def test_more_or_fewer_slots(slots: int) -> None:
    """What slots held they hold, whatever rows they used; new slots have room, and what was staged is forgotten."""
    store, given = make_known_store()
    store.commit(0, {1: 5, 3: 4})
    held = [[store.contents.expert_of_row[layer][row] for row in store.row_of_slot[layer]] for layer in range(LAYERS)]
    store.resize(slots)
    rows = list(range(slots))
    assert store.row_of_slot.tolist() == [rows] * LAYERS
    assert [store.num_rows(layer) for layer in range(LAYERS)] == [slots] * LAYERS
    for layer, experts in enumerate(held):
        kept = experts[:slots]
        assert store.rows_of(layer).tolist() == store.row_table(layer).tolist() == [*rows, slots]
        assert store.contents.expert_of_row[layer] == kept + [NOTHING] * (slots + store.staging_rows - len(kept))
        for row, expert in enumerate(kept):
            assert is_as_given(store, layer, row, given[layer, expert])
            assert store.contents.sums[layer, row] == checksums(given[layer, expert].values())
    assert len(store.contents.sums) == LAYERS * min(slots, SLOTS)


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
