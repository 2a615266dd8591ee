"""Memory tiers as nouns: what they refuse, how files say them, and that files without them are what they were."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.placement.cluster import Cluster
from moeplace.placement.engines import write_engine_placement
from moeplace.placement.memory import DISK, HOST, RESIDENT, DiskTier, HostCompute, HostTier, Memory
from moeplace.placement.migration.file import load_plan, save_plan
from moeplace.placement.migration.plan import apply_plan, plan_migration
from moeplace.placement.placement import EMPTY_SLOT, Placement, index_order
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.profiling.errors import FormatError, InputError
from tests.runtime.placements import random_placement

HOST_TIER = HostTier(bandwidth=1e9, latency=1e-3)


def tiered(seed: int, *, ranks: int = 3) -> Placement:
    """A random placement with replicas, empty slots and random tiers."""
    placement = random_placement(2, 7, ranks, seed=seed)
    draw = np.random.default_rng(seed)
    tier = draw.integers(0, 3, placement.slot_to_expert.shape)
    tier[0, placement.slot_to_expert[0] >= 0] = HOST  # never all resident
    return placement.replace(tier=tier)


@pytest.mark.parametrize("seed", range(3))
def test_a_file_keeps_tiers(tmp_path: Path, seed: int, dated_seed: int) -> None:
    """Written and read, a placement has the same tiers and digest; the tag warns older readers."""
    for placement in (tiered(seed), tiered(dated_seed)):
        save_placement(tmp_path / "p.json", placement)
        assert json.loads((tmp_path / "p.json").read_text())["format"] == "moeplace.placement/2"
        again = load_placement(tmp_path / "p.json")
        assert again.equals(placement)
        assert np.array_equal(again.tier, placement.tier)  # type: ignore[arg-type]


def test_without_tiers_files_and_digests_are_as_before(tmp_path: Path) -> None:
    """All resident is no tier at all: neither the file nor the digest says anything of it."""
    plain = index_order(np.array([4, 4]), np.array([2, 2]), np.zeros(2, int))
    resident = plain.replace(tier=np.zeros((2, 4), int))
    assert resident.tier is None
    assert resident.digest == plain.digest
    for name, placement in (("a", plain), ("b", resident)):
        save_placement(tmp_path / name, placement)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "tier" not in json.loads((tmp_path / "a").read_text())
    assert plain.replace(tier=np.array([[1, 0, 0, 0], [0, 0, 0, 0]])).digest != plain.digest


@pytest.mark.parametrize(("change", "sentence"), [
    ({"format": "moeplace.placement/1"}, "go together"),
    ({"tier": [[0, 3, 0, 0]]}, "shape|tier 3"),
    ({"tier": [[0, 3, 0, 0], [0, 0, 0, 0]]}, "slot 1 of MoE layer 0 is in tier 3"),
    ({"tier": "host"}, "integers"),
])  # fmt: skip
def test_a_wrong_tier_is_named(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    """Tag and tiers go together; a tier that does not exist is named with its slot."""
    placement = index_order(np.array([4, 4]), np.array([2, 2]), np.zeros(2, int))
    save_placement(tmp_path / "p", placement.replace(tier=np.array([[0, 1, 0, 2], [0, 0, 0, 1]])))
    document = {**json.loads((tmp_path / "p").read_text()), **change}
    (tmp_path / "p").write_text(json.dumps(document))
    with pytest.raises((FormatError, InputError), match=sentence):
        load_placement(tmp_path / "p")


@pytest.mark.parametrize("seed", range(3))
def test_an_expert_keeps_its_tier_when_slots_move(seed: int, dated_seed: int) -> None:
    """Slots of a rank shuffled: every (rank, expert) has the tier it had; a new rank gets the fastest there was."""
    for placement in (tiered(seed), tiered(dated_seed)):
        draw = np.random.default_rng(seed)
        rows = placement.slot_to_expert.copy()
        for rank in range(placement.num_ranks):
            here = placement.slots_on(rank)
            rows[:, here] = rows[:, here][:, draw.permutation(here.stop - here.start)]
        moved = placement.replace(slot_to_expert=rows)
        assert np.array_equal(moved.tier_LER, placement.tier_LER)
    one = index_order(np.array([2]), np.array([1, 1]), np.zeros(2, int)).replace(tier=np.array([[HOST, DISK]]))
    swapped = one.replace(slot_to_expert=np.array([[1, 0]]))
    assert swapped.tier is not None
    assert swapped.tier.tolist() == [[DISK, HOST]]


def test_empty_slots_have_no_tier() -> None:
    """What is said of an empty slot is not kept."""
    placement = Placement(
        np.array([[0, EMPTY_SLOT, 1, EMPTY_SLOT]]), np.array([2, 2]), np.zeros(2, int), np.array([2]),
        tier=np.array([[HOST, HOST, RESIDENT, DISK]]),
    )  # fmt: skip
    assert placement.tier is not None
    assert placement.tier.tolist() == [[HOST, RESIDENT, RESIDENT, RESIDENT]]


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "vllm-ascend", "omni", "exflow"])
def test_engines_without_tiers_refuse_by_name(tmp_path: Path, engine: str) -> None:
    """No engine's file can say that an expert is not in fast memory: nothing is written."""
    placement = index_order(np.array([4, 4]), np.array([2, 2]), np.zeros(2, int)).replace(
        tier=np.array([[0, 1, 0, 0], [0, 0, 0, 0]])
    )
    with pytest.raises(InputError, match=f"^{engine} keeps every expert in fast memory, but 1 slots"):
        write_engine_placement(tmp_path / "out", placement, engine)
    assert not list(tmp_path.iterdir())
    save_placement(tmp_path / "p", placement)
    assert main(["export", str(tmp_path / "p"), "--to", engine, "--out", str(tmp_path / "out")]) == 1


CLUSTER = """
ranks_per_node = 2
slots_per_rank = 4
[fast]
{fast}
[host]
latency = 1e-3
bandwidth = 1e9
compute = {{per_expert = 2e-3, per_token = 1e-4}}
[disk]
latency = 1e-2
bandwidth = 1e8
"""


def test_a_cluster_file_states_tiers(tmp_path: Path) -> None:
    """Budget in slots or bytes, one number or one a rank; seconds of a load add up over the tiers it crosses."""
    for fast, rows in (("slots = 3", [12, 12]), ("bytes = [1000, 700.0]", [10, 7]), ("slots = [1, 2]", [4, 8])):
        (tmp_path / "c.toml").write_text(CLUSTER.format(fast=fast))
        memory = Cluster.from_toml(tmp_path / "c.toml").memory
        assert memory is not None
        assert [memory.rows(rank, layers=4, expert_bytes=100) for rank in range(2)] == rows
        assert memory.load_seconds(HOST, 1e6) == pytest.approx(1e-3 + 1e-3)
        assert memory.load_seconds(DISK, 1e6) == pytest.approx(2e-3 + 1e-2 + 1e-2)
        assert memory.host.compute == HostCompute(2e-3, 1e-4)
    plain = tmp_path / "plain.toml"
    plain.write_text("ranks_per_node = 2\nslots_per_rank = 4\n")
    assert Cluster.from_toml(plain).memory is None


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("slots = 3", "slots = 3\nbytes = 9", "either slots or bytes"),
    ("slots = 3", "", "either slots or bytes"),
    ("slots = 3", "slots = 0", "fast slots must be positive"),
    ("slots = 3", "slots = 3\ntransit = 0", "transit rows"),
    ("slots = 3", "slots = [1, 2, 3]", "not a cluster description"),
    ("latency = 1e-3", "latency = -1", "host latency"),
    ("bandwidth = 1e9", "bandwidth = 0", "host bandwidth"),
    ("per_expert = 2e-3", "per_expert = -1", "host compute per_expert"),
    ("bandwidth = 1e8", "bandwidth = -3", "disk bandwidth"),
    ("[host]", "[hosts]", "unknown key 'hosts'"),
    ("[fast]\nslots = 3", "", r"need the table \[fast\]"),
])  # fmt: skip
def test_a_wrong_cluster_file_is_one_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    """Every value has its rule, and the sentence names the file."""
    path = tmp_path / "c.toml"
    path.write_text(CLUSTER.format(fast="slots = 3").replace(old, new, 1))
    with pytest.raises((InputError, FormatError), match=sentence) as caught:
        Cluster.from_toml(path)
    assert str(path) in str(caught.value)


def test_memory_is_checked() -> None:
    """Either unit, not both; bytes that cannot be counted, a budget below its transit rows, no disk."""
    with pytest.raises(InputError, match=r"either in slots"):
        Memory(HOST_TIER)
    with pytest.raises(InputError, match=r"either in slots"):
        Memory(HOST_TIER, fast_slots=np.ones(2), fast_bytes=np.ones(2))
    by_bytes = Memory(HOST_TIER, fast_bytes=np.full(2, 150.0))
    with pytest.raises(InputError, match=r"how many bytes an expert has"):
        by_bytes.rows(0, layers=2, expert_bytes=1)
    with pytest.raises(InputError, match=r"rank 1 .*2 rows for transit"):
        by_bytes.rows(1, layers=2, expert_bytes=100)
    with pytest.raises(InputError, match=r"no disk tier"):
        by_bytes.load_seconds(DISK, 100)
    assert Memory(HOST_TIER, fast_slots=np.ones(2), disk=DiskTier(1e8)).load_seconds(DISK, 1e8) == pytest.approx(1.101)
    with pytest.raises(InputError, match="memory is stated for 3 ranks, but there are 2"):
        Cluster.uniform(2, slots_per_rank=2).replace(memory=Memory(HOST_TIER, fast_slots=np.ones(3)))


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_ends_in_the_tiers_that_were_asked_for(tmp_path: Path, seed: int, dated_seed: int) -> None:
    """Through the plan's file too, also where slots stay and only tiers change, or where they all become resident."""
    for old, new in (
        (tiered(seed), tiered(seed + 10)),
        (tiered(dated_seed), tiered(dated_seed).replace(tier=None)),
        (random_placement(2, 7, 3, seed=seed), tiered(seed)),
    ):
        save_plan(tmp_path / "m", plan_migration(old, new))
        assert apply_plan(old, load_plan(tmp_path / "m")).equals(new)
