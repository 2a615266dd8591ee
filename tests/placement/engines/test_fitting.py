"""Placements made loadable: empty slots filled, layers added; tables that waste slots or are for another cluster."""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml

from moeplace.placement.engines import REPEATS, read_engine_placement, sidecar_path, write_engine_placement
from moeplace.placement.engines.fitting import add_layers, fill_empty_slots
from moeplace.placement.placement import Placement
from moeplace.placement.repeats import repeat_experts, without_bare_ranks
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from tests.seeds import TODAY

SEEDS = (0, 1, 2, TODAY)


def random_with_gaps(seed: int) -> Placement:
    """Experts once each, replicas in some of the other slots, the rest empty."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    ranks, slots, layers = int(rng.integers(2, 5)), int(rng.integers(3, 7)), int(rng.integers(1, 4))
    experts = int(rng.integers(slots, ranks * slots))
    table = np.full((layers, ranks * slots), -1)
    for row in table:
        row[rng.permutation(ranks * slots)[:experts]] = rng.permutation(experts)
        for slot in np.flatnonzero(row < 0):
            block = slice(slot // slots * slots, (slot // slots + 1) * slots)
            expert = int(rng.integers(experts))
            if rng.random() < 0.4 and expert not in row[block]:
                row[slot] = expert
    return Placement(table, np.full(ranks, slots), np.zeros(ranks, int), np.full(layers, experts))


@pytest.mark.parametrize("seed", SEEDS)
def test_empty_slots_are_filled(seed: int, tmp_path: Path) -> None:
    """What was held stays where it was, no rank gets an expert twice, and the file can be written."""
    placement = random_with_gaps(seed)
    full, filled = fill_empty_slots(placement)
    held = placement.slot_to_expert >= 0
    assert filled == (~held).sum()
    assert (full.slot_to_expert >= 0).all()
    assert (full.slot_to_expert[held] == placement.slot_to_expert[held]).all()
    write_engine_placement(tmp_path / "p.jsonl", full, "vllm")
    counts = full.replica_counts.sum(axis=0)
    assert counts.sum() == full.slot_to_expert.size


def test_slots_of_a_rank_that_holds_everything_stay_empty() -> None:
    """A rank of three slots cannot hold more than two experts."""
    placement = Placement(np.array([[0, 1, -1, 0, -1, -1]]), np.full(2, 3), np.zeros(2, int), np.array([2]))
    full, filled = fill_empty_slots(placement)
    assert full.slot_to_expert.tolist() == [[0, 1, -1, 0, 1, -1]]
    assert filled == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_added_layers(seed: int, tmp_path: Path) -> None:
    """Known layers stay; new ones are in index order with every expert; TensorRT-LLM gets a row for each."""
    placement, _ = fill_empty_slots(random_with_gaps(seed))
    layers = placement.num_layers
    placement = placement.replace(layer_ids=np.arange(layers) + 3, num_hidden_layers=layers + 3)
    grown = add_layers(placement, (1, 0, layers + 3))
    assert np.array_equal(grown.layer_ids, [0, 1, *range(3, layers + 3), layers + 3])
    assert grown.num_hidden_layers == layers + 4
    assert np.array_equal(grown.slot_to_expert[2:-1], placement.slot_to_expert)
    trivial = np.arange(placement.num_slots) % placement.num_experts
    assert all(np.array_equal(grown.slot_to_expert[index], trivial) for index in (0, 1, -1))
    write_engine_placement(tmp_path / "p.yaml", grown, "trtllm")
    document = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert sorted(document["initial_global_assignments"]) == grown.layer_ids.tolist()
    with pytest.raises(InputError, match="decoder layer 3 is there already"):
        add_layers(placement, (3,))


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "vllm-ascend"])
def test_a_table_that_holds_an_expert_twice_on_a_rank(engine: str, tmp_path: Path) -> None:
    """Read with a warning that counts the slots and names the decoder layer; the second slot is empty."""
    rows = [[0, 3, 1, 2, 1, 0], [1, 2, 0, 3, 3, 2]]
    layer_ids = (0, 1) if engine in ("vllm", "vllm-ascend") else (4, 7)
    path = tmp_path / ("p.yaml" if engine == "trtllm" else "p.jsonl" if engine == "vllm" else "p.json")
    if engine == "sglang":
        every = [[0, 1, 2, 3, 0, 1]] * 9
        every[4], every[7] = rows
        path.write_text(json.dumps({"physical_to_logical_map": every}))
    elif engine == "vllm":
        path.write_text(json.dumps(rows))
    elif engine == "trtllm":
        path.write_text(yaml.safe_dump({"num_slots": 6, "initial_global_assignments": dict(zip(layer_ids, rows,
                                        strict=True)), "layer_updates_per_iter": 0}))  # fmt: skip
    else:
        layers = [{"device_list": [{"device_expert": row[:3]}, {"device_expert": row[3:]}]} for row in rows]
        path.write_text(json.dumps({"moe_layer_count": 2, "layer_list": layers}))
    with pytest.warns(MoeplaceWarning) as caught:
        placement = read_engine_placement(path, engine, num_ranks=2, layer_ids=layer_ids)
    text = next(str(w.message) for w in caught if "repeat an expert" in str(w.message))
    assert "1 slots repeat an expert" in text
    assert f"rank 1 holds expert 3 twice in decoder layer {layer_ids[1]}" in text
    assert placement.slot_to_expert.tolist() == [rows[0], [1, 2, 0, 3, -1, 2]]


def test_running_maps_with_empty_slots(tmp_path: Path) -> None:
    """-1 in a map is an empty slot."""
    (tmp_path / "p.jsonl").write_text(json.dumps([[0, 1, -1, 2, 3, 0]]))
    placement = read_engine_placement(tmp_path / "p.jsonl", "vllm", num_ranks=2)
    assert placement.slot_to_expert.tolist() == [[0, 1, -1, 2, 3, 0]]


def test_a_table_for_another_number_of_ranks(tmp_path: Path) -> None:
    """The sidecar knows: both numbers are named, and the file is read all the same on request."""
    rows = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
    placement = Placement(rows, np.full(2, 4), np.zeros(2, int), np.full(2, 8))
    write_engine_placement(tmp_path / "p.yaml", placement, "trtllm")
    with pytest.raises(InputError, match=r"made for 2 ranks, as p.yaml.moeplace.json says, and not for 4"):
        read_engine_placement(tmp_path / "p.yaml", "trtllm", num_ranks=4)
    with pytest.raises(InputError, match=r"made for 8 experts, .* not for 16"):
        read_engine_placement(tmp_path / "p.yaml", "trtllm", num_experts=16)
    other = read_engine_placement(tmp_path / "p.yaml", "trtllm", num_ranks=4, ignore_sidecar=True)
    assert (other.num_ranks, other.slot_to_expert.tolist()) == (4, rows.tolist())
    sidecar_path(tmp_path / "p.yaml").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_engine_placement(tmp_path / "p.yaml", "trtllm", num_ranks=4).equals(other)


def test_a_shared_expert_among_the_routed_ones(tmp_path: Path) -> None:
    """An id beyond E that every rank holds is named for what it may be; one that few hold is not."""
    rows = [[0, 1, 4, 2, 3, 4]]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows))
    with pytest.raises(FormatError, match=r"expert 4, .* every rank holds it, as a shared expert .* --num-experts 5"):
        read_engine_placement(tmp_path / "p.jsonl", "vllm", num_ranks=2, num_experts=4)
    assert read_engine_placement(tmp_path / "p.jsonl", "vllm", num_ranks=2).num_experts == 5
    (tmp_path / "p.jsonl").write_text(json.dumps([[0, 1, 4, 2, 3, 0]]))
    with pytest.raises(FormatError, match=r"expert 4, which must lie in 0..3$"):
        read_engine_placement(tmp_path / "p.jsonl", "vllm", num_ranks=2, num_experts=4)


@pytest.mark.parametrize("engine", REPEATS)
@pytest.mark.parametrize("seed", [0, 1, TODAY])
def test_empty_slots_repeat_an_expert_of_their_rank(engine: str, seed: int, tmp_path: Path) -> None:
    """No rank holds more than before, what is repeated is alone on its rank where it can be, and it reads back."""
    placement = without_bare_ranks(random_with_gaps(seed))
    table, count = repeat_experts(placement)
    empty = placement.slot_to_expert < 0
    assert count == empty.sum()
    assert (table[~empty] == placement.slot_to_expert[~empty]).all()
    for layer, slot in np.argwhere(empty):
        held = placement.copies_LER[layer, :, placement.rank_of_slot[slot]] > 0
        assert held[table[layer, slot]]
        alone = held & (placement.replica_counts[layer] == 1)
        assert alone[table[layer, slot]] or not alone.any()
    file = tmp_path / f"p{'.json' if engine == 'sglang' else '.jsonl'}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_engine_placement(file, placement, engine, repeat=True)
    text = file.read_text()
    assert "-1" not in text
    with pytest.warns(MoeplaceWarning, match=f"{count} slots repeat") if count else nullcontext():
        again = read_engine_placement(file, engine)
    assert (again.copies_LER == placement.copies_LER).all()
