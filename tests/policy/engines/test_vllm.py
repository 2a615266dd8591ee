"""Inside vLLM's own classes (0.33): parser and configuration, `EplbState` on two ranks, elastic widths.

Skipped where vLLM's wheel is not unpacked (`make test-engines` does that). What is stubbed stands in `stand_ins.py` and
`vllm_rank.py`.
"""

from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.policy.engines.programs import finish, start
from tests.policy.engines.stand_ins import folder_of

FOLDER = folder_of("vllm")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="vLLM is not unpacked: make test-engines"),
    pytest.mark.timeout(400),
]


def test_the_configuration_takes_our_policies() -> None:
    """Through vLLM's parser, asynchronous too; vLLM still refuses what else it refuses; elastic widths are filled."""
    (found,) = finish(start("vllm_process", FOLDER))
    assert "moeplace" in found["before"]
    assert found["asynchronous"] == ["moeplace", True, "moeplace"]
    assert found["synchronous"] == ["moeplace-file", False, "moeplace-file"]
    assert found["default"] == ["default", True, "default"]
    assert "other" in found["unknown"]
    assert "torch_nccl" in found["still checked"]
    assert found["policies"] == {"default": "DefaultEplbPolicy", "moeplace": "Balance", "moeplace-file": "FromFile"}
    for name, slots in (("grown", 12), ("shrunk", 8), ("first", 8), ("same", 8)):
        (row,) = found["elastic"][name]
        assert len(row) == slots
        assert set(row) == {0, 1, 2, 3, 4, 5}
    for own, ours in zip(*found["repeated"], strict=True):
        assert any(len(set(held)) < 6 for held in (own[:6], own[6:]))
        assert len(ours) == 12
        assert set(ours) == {0, 1, 2, 3, 4, 5}
        assert ours != own
    assert found["hopeless"]


@pytest.mark.parametrize("policy", ["moeplace", "moeplace-file"])
def test_the_environment_replaces_the_default(policy: str, tmp_path: Path) -> None:
    """Where a configuration cannot change."""
    environment = {"MOEPLACE_POLICY": policy, "MOEPLACE_PLACEMENT": str(tmp_path / "p.json")}
    (found,) = finish(start("vllm_process", FOLDER, **environment))
    assert found["policies"]["default"] == found["policies"][policy]


PAIRS = [[0, 5], [1, 6], [2, 7], [3, 4]]
"""Of experts that serve the same tokens in the recorded trace."""


@pytest.mark.parametrize(("mode", "traced"), [("sync", False), ("async", False), ("async", True)])
def test_weights_follow_the_map(mode: str, traced: bool, tmp_path: Path) -> None:
    """vLLM's own state moves what the policy says, on two ranks: every weight is where the map has it.

    With a trace a rank may have an expert twice, and experts of a token are mostly on one rank.
    """
    environment = {}
    if traced:
        save_trace(tmp_path / "trace.npz", RoutingTrace(np.tile(PAIRS, (3, 50, 1)).transpose(1, 0, 2), np.full(3, 8)))
        environment = {"MOEPLACE_TRACE": str(tmp_path / "trace.npz"), "MOEPLACE_MAX_IMBALANCE": "2"}
    found = finish(*(start("vllm_rank", rank, 2, tmp_path / "store", mode, FOLDER, **environment) for rank in range(2)))
    first, second = found
    assert first["policy"] == second["policy"] == "Balance"
    moved = doubled = 0
    for one, other in zip(first["rounds"], second["rounds"], strict=True):
        assert one["map"] == other["map"]
        for layer, row in enumerate(one["map"]):
            weights = one["weights"][layer] + other["weights"][layer]
            assert weights == [1000 * layer + expert for expert in row]
            moved += row != one["before"][layer]
            doubled += len(set(row[:6])) < 6 or len(set(row[6:])) < 6
            if traced:
                assert sum(len({slot // 6 for slot, e in enumerate(row) if e in pair}) == 1 for pair in PAIRS) >= 3
            else:
                assert imbalance(row, one["load"][layer]) <= imbalance(one["before"][layer], one["load"][layer])
    assert moved
    assert bool(doubled) == traced


def imbalance(row: list[int], load_E: list[int]) -> float:
    """Busiest of two ranks over mean."""
    parts = [load_E[expert] / row.count(expert) for expert in row]
    half = len(row) // 2
    return 2 * max(sum(parts[:half]), sum(parts[half:])) / sum(load_E)
