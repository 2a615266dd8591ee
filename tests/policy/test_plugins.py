"""The plug-ins without their engines: settings, files, widths that change, ranks that disagree."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.placement.policy.in_force import fetched, of_width
from moeplace.placement.policy.readiness import kernels
from moeplace.placement.policy.settings import Settings
from moeplace.profiling.kernel_cache import NO_WARM_UP
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.plugins import sglang, vllm
from tests.seeds import TODAY

SEEDS = [*range(4), TODAY]
LOAD = torch.tensor([[90, 10, 20, 30, 40, 50], [5, 5, 5, 60, 5, 5]], dtype=torch.int32)
OLD = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]] * 2)


class OwnPolicy:
    """In the place of vLLM's."""

    @classmethod
    def rebalance_experts(cls, *arguments: object) -> str:
        """Says that it was asked."""
        return "the engine's own"


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of vLLM as far as the policy asks for them."""
    policy: Any = types.ModuleType("vllm.distributed.eplb.policy")
    policy.DefaultEplbPolicy = OwnPolicy
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, policy.__name__, policy)
    for name in [name for name in os.environ if name.startswith("MOEPLACE_") and name != NO_WARM_UP]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MOEPLACE_POLICY": "best"}, "MOEPLACE_POLICY (best)"),
        ({"MOEPLACE_POLICY": "moeplace-file"}, "MOEPLACE_PLACEMENT"),
        ({"MOEPLACE_MAX_MOVES": "few"}, "MOEPLACE_MAX_MOVES (few) must be a whole number"),
        ({"MOEPLACE_MAX_MOVES_PER_RANK": "-1"}, "MOEPLACE_MAX_MOVES_PER_RANK (-1)"),
        ({"MOEPLACE_MOVE_PRICE": "nan"}, "MOEPLACE_MOVE_PRICE (nan) must be a number"),
        ({"MOEPLACE_TIME_LIMIT": "inf"}, "MOEPLACE_TIME_LIMIT (inf)"),
        ({"MOEPLACE_MAX_IMBALANCE": "0.9"}, "MOEPLACE_MAX_IMBALANCE (0.9) must be a number of at least 1"),
        ({"MOEPLACE_TRACE_TIME_LIMIT": "long"}, "MOEPLACE_TRACE_TIME_LIMIT (long)"),
    ],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], said: str) -> None:
    """When the plug-in is loaded, before anything serves."""
    with pytest.raises(ValueError) as refusal:
        Settings.of_environment(environment)
    assert said in str(refusal.value)


def test_a_trace_that_is_not_there_stops_vllm_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a node without the file would plan differently from the others."""
    monkeypatch.setenv("MOEPLACE_TRACE", str(tmp_path / "trace.npz"))
    with pytest.raises(ValueError, match=r"MOEPLACE_TRACE \(.*trace.npz\) must be a file that can be read"):
        vllm.register()
    (tmp_path / "trace.npz").touch()
    Settings.of_environment().check_trace()


def test_a_trace_counts_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs come together on a rank; a trace of another model changes nothing."""
    assert kernels().ready(wait=True)  # vLLM's ranks keep their map until then
    pairs = np.array([[0, 5], [1, 4], [2, 3]])
    plain = vllm.Balance.rebalance_experts(LOAD, 8, 1, 1, 2, OLD)
    monkeypatch.setenv("MOEPLACE_MAX_IMBALANCE", "3")
    for experts in (6, 7):
        trace = RoutingTrace(np.tile(pairs[:, None], (50, 2, 1)), np.full(2, experts))
        save_trace(tmp_path / f"{experts}.npz", trace)
        monkeypatch.setenv("MOEPLACE_TRACE", str(tmp_path / f"{experts}.npz"))
        found = vllm.Balance.rebalance_experts(LOAD, 8, 1, 1, 2, OLD)
        if experts == 7:
            assert torch.equal(found, plain)
            continue
        for row in found.numpy():
            for pair in pairs:
                assert len(set(np.flatnonzero(np.isin(row, pair)) // 4)) == 1


def test_limits_are_those_that_are_set() -> None:
    """As numbers, under the names of `plan`."""
    given = {"MOEPLACE_MAX_MOVES": " 16 ", "MOEPLACE_MOVE_PRICE": "1e-4", "MOEPLACE_TIME_LIMIT": ""}
    assert Settings.of_environment(given).limits == {"max_moves": 16, "move_price": 1e-4}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_come_and_go(ranks: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any width that holds the experts, from any other, limits on moves or not: no slot stays empty."""
    print("seed", seed)
    monkeypatch.setenv("MOEPLACE_MAX_MOVES", "1")
    rng = np.random.default_rng(seed)
    load = torch.from_numpy(rng.integers(0, 99, (3, 8)))
    load[int(rng.integers(3))] = 0
    old = torch.from_numpy(np.stack([rng.permutation(np.arange(16) % 8) for _ in range(3)]))
    for before in (old, torch.where(torch.arange(16) < 8, old, -1)):
        after = vllm.Balance.rebalance_experts(load, 8 * ranks, 2, 1, ranks, before)
        assert after.dtype == torch.int64
        assert after.shape == (3, 8 * ranks)
        assert all(set(row) == set(range(8)) for row in after.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_the_router_stay_on_their_nodes(seed: int) -> None:
    """An expert that is fetched is fetched by the node that holds most of its group; without groups by any."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    home = np.repeat(rng.permutation(np.arange(4) % 2), 4)  # of 4 groups of 4 experts on 2 nodes of 2 ranks
    old = np.stack(
        [np.concatenate([rng.permutation(np.resize(np.flatnonzero(home == n), 10)) for n in (0, 1)]) for _ in range(3)]
    )
    load = torch.from_numpy(rng.zipf(1.4, (3, 16)).clip(0, 500))
    node = np.repeat([0, 1], 10)
    strayed = []
    for groups in (4, 1):
        after = vllm.Balance.rebalance_experts(load, 20, groups, 2, 4, torch.from_numpy(old)).numpy()
        strayed.append(int((home[after] != node).sum()))
        assert not np.array_equal(after, old)
    assert strayed[0] == 0
    assert strayed[1] > 0


def test_a_file_is_loaded_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot by slot; in another shape the map in force stays."""
    slots = np.array([[5, 1, 2, 3, 4, 0, 2, 3], [0, 4, 2, 3, 1, 5, 0, 2]], np.int32)
    save_placement(tmp_path / "p.json", Placement(slots, np.array([4, 4]), np.array([0, 0]), np.array([6, 6])))
    monkeypatch.setenv("MOEPLACE_PLACEMENT", str(tmp_path / "p.json"))
    assert vllm.FromFile.rebalance_experts(LOAD, 8, 1, 1, 2, OLD).tolist() == slots.tolist()
    assert vllm.FromFile.rebalance_experts(LOAD * 0, 8, 1, 1, 2, OLD).tolist() == slots.tolist()
    assert vllm.FromFile.rebalance_experts(LOAD[:1], 8, 1, 1, 2, OLD[:1]).tolist() == OLD[:1].tolist()
    assert vllm.FromFile.rebalance_experts(LOAD, 8, 1, 1, 4, OLD).tolist() == OLD.tolist()
    monkeypatch.setenv("MOEPLACE_PLACEMENT", str(tmp_path / "absent.json"))
    assert vllm.FromFile.rebalance_experts(LOAD, 8, 1, 1, 2, OLD).tolist() == OLD.tolist()
    assert vllm.FromFile.rebalance_experts(LOAD, 8, 1, 1, 2, None) == "the engine's own"


def test_what_cannot_go_on_is_left_to_the_engine() -> None:
    """Loads that are no numbers: the map in force stays; without one that can go on, the engine's policy answers."""
    broken = torch.full((2, 6), float("nan"))
    assert vllm.Balance.rebalance_experts(broken, 8, 1, 1, 2, OLD).tolist() == OLD.tolist()
    for old in (None, OLD[:, :4], torch.where(torch.arange(8) < 4, OLD, -1)):
        assert vllm.Balance.rebalance_experts(broken, 8, 1, 1, 2, old) == "the engine's own"


def test_a_disagreement_keeps_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is not ready, or found another plan, is enough."""
    monkeypatch.setattr(vllm, "ranks_agree", lambda answer: False)
    assert vllm.Balance.rebalance_experts(LOAD, 8, 1, 1, 2, OLD).tolist() == OLD.tolist()


def test_sglang_maps_are_of_one_map() -> None:
    """Slots of every expert in order, -1 behind them, and their numbers."""
    slots = np.array([[0, 3, 1, 2, 1, 0], [1, 2, 0, 3, 0, 2]], np.int32)
    row, where, counts = sglang._maps(slots, 4, torch.device("cpu"))
    assert row.tolist() == slots.tolist()
    assert where.tolist() == [[[0, 5], [2, 4], [3, -1], [1, -1]], [[2, 4], [0, -1], [1, 5], [3, -1]]]
    assert counts.tolist() == [[2, 2, 1, 1], [2, 1, 2, 1]]


def test_widths_and_moves() -> None:
    """The first slots stay; a rank fetches what it lacked."""
    before = np.array([[0, 1, 2, 3]])
    assert of_width(before, 6).tolist() == [[0, 1, 2, 3, -1, -1]]
    assert of_width(before, 2).tolist() == [[0, 1]]
    assert fetched(before, np.array([[1, 2, 3, 3]]), 2).tolist() == [1]
