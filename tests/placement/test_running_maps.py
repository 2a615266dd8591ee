"""A placement file as the map in force: engines' own balancers put an expert twice on a rank."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import InputError, MoeplaceWarning
from tests.seeds import TODAY


@pytest.mark.parametrize("seed", [*range(5), TODAY])
def test_a_second_slot_of_a_rank_is_free_in_a_map_in_force(tmp_path: Path, seed: int) -> None:
    """The first slot keeps the expert, every further one of that rank is empty; as a placement it is an error."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    on_rank = rng.integers(2, 6, 3)
    experts = int(on_rank.sum()) - 3
    rows = np.stack([rng.permutation(np.resize(rng.permutation(experts), on_rank.sum())) for _ in range(2)])
    start = np.cumsum(on_rank) - on_rank
    rows[0, start[0] + 1] = rows[0, start[0]]  # a repeat for certain; who lost its slot gets another one
    for lost in set(range(experts)) - set(rows[0].tolist()):
        counts = np.bincount(rows[0], minlength=experts)
        rows[0, next(s for s in range(start[0] + 2, len(rows[0])) if counts[rows[0, s]] > 1)] = lost
    document = {
        "format": "moeplace.placement/1", "num_layers": 2, "num_experts": experts, "num_ranks": 3,
        "slots_per_rank": on_rank.tolist(), "slot_to_expert": rows.tolist(), "digest": "sha256:of no placement",
    }  # fmt: skip
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="twice"):
        load_placement(path)
    with pytest.warns(MoeplaceWarning, match="count as empty") as said:
        placement = load_placement(path, running=True)
    empty = 0
    for row, read in zip(rows, placement.slot_to_expert, strict=True):
        for first, count in zip(start, on_rank, strict=True):
            held: set[int] = set()
            for slot in range(first, first + count):
                assert read[slot] == (-1 if row[slot] in held else row[slot])
                empty += row[slot] in held
                held.add(row[slot])
    assert f" {empty} slots" in str(said[0].message)


def test_a_file_without_repeats_is_read_as_ever(tmp_path: Path) -> None:
    """No warning, empty slots are no repeats, and a digest must fit."""
    document = {
        "format": "moeplace.placement/1", "num_layers": 1, "num_experts": 2, "num_ranks": 2, "slots_per_rank": 3,
        "slot_to_expert": [[0, -1, -1, 1, 0, -1]],
    }  # fmt: skip
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    assert load_placement(path, running=True).equals(load_placement(path))
    path.write_text(json.dumps({**document, "digest": "sha256:other"}))
    with pytest.raises(InputError, match="digest"):
        load_placement(path, running=True)
