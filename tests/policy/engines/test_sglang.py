"""Inside SGLang's own modules (0.5.23): hook registry, `init_by_eplb`, maps of slots.

Skipped where SGLang's wheel is not unpacked (`make test-engines`). What is stubbed stands in `sglang_process.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.policy.engines.programs import finish, start
from tests.policy.engines.stand_ins import folder_of

FOLDER = folder_of("sglang")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="SGLang is not unpacked: make test-engines"),
    pytest.mark.timeout(400),
]


def fetched(before: list[int], after: list[int]) -> int:
    """Experts that one of four ranks has and had not."""
    size = len(before) // 4
    return sum(len(set(after[i : i + size]) - set(before[i : i + size])) for i in range(0, len(before), size))


def test_the_hook_plans_near_the_map_in_force() -> None:
    """SGLang's own classes take what the hook returns; the second plan moves as little as told, no dense layer."""
    (found,) = finish(start("sglang_process", FOLDER, MOEPLACE_POLICY="moeplace", MOEPLACE_MAX_MOVES="3"))
    assert found["hooks"] == ["sglang.srt.eplb.eplb_algorithms.rebalance_experts"]
    first, second = found["rounds"]
    assert first["before"] is None
    for each in (first, second):
        check(each)
    assert second["before"] == first["map"]
    assert second["map"][0] == first["map"][0]
    moves = [fetched(*rows) for rows in zip(first["map"], second["map"], strict=True)]
    assert max(moves) <= 3
    assert any(moves)


def test_a_map_with_repeated_experts_is_planned_from() -> None:
    """SGLang's own balancer puts an expert twice on a rank: such a slot is one that may be given to another."""
    (found,) = finish(start("sglang_process", FOLDER, MOEPLACE_POLICY="moeplace", MOEPLACE_MAX_MOVES="3"))
    each = found["repeated"]
    ranks = [row[i : i + 6] for row in each["before"] for i in range(0, 24, 6)]
    assert any(len(set(held)) < 6 for held in ranks)
    check(each, twice=True)
    moves = [fetched(*rows) for rows in zip(each["before"], each["map"], strict=True)]
    assert 0 < max(moves) <= 3


def check(each: dict[str, Any], *, twice: bool = False) -> None:
    """Every expert has a slot, none twice on a rank unless it may be, and the three answers are of one map."""
    for row, slots_E, counts_E in zip(each["map"], each["slots"], each["counts"], strict=True):
        for expert, (slots, count) in enumerate(zip(slots_E, counts_E, strict=True)):
            assert [slot for slot in slots if slot >= 0] == [s for s, e in enumerate(row) if e == expert]
            assert count == row.count(expert) >= 1
            assert twice or len({slot // 6 for slot in slots if slot >= 0}) == count


def test_a_trace_is_planned_with(tmp_path: Path) -> None:
    """SGLang's own classes take a map that has an expert twice on a rank; experts of a token are mostly on one rank."""
    pairs = np.arange(16).reshape(2, 8).T
    trace = RoutingTrace(np.tile(pairs[:, None], (50, 3, 1)), np.full(3, 16), layer_ids=np.arange(1, 4))
    save_trace(tmp_path / "trace.npz", trace)
    given = {
        "MOEPLACE_TRACE": str(tmp_path / "trace.npz"),
        "MOEPLACE_MAX_IMBALANCE": "3",
        "MOEPLACE_POLICY": "moeplace",
    }
    (found,) = finish(start("sglang_process", FOLDER, **given))
    for each in found["rounds"]:
        check(each, twice=True)
        for row in each["map"][1:]:
            assert sum(len({slot // 6 for slot, e in enumerate(row) if e in pair}) == 1 for pair in pairs) >= 6
    assert found["rounds"][1]["map"][0] == found["rounds"][0]["map"][0]


def test_without_the_variable_sglang_balances_itself() -> None:
    """An installed package alone changes nothing."""
    (found,) = finish(start("sglang_process", FOLDER, MOEPLACE_POLICY=""))
    assert found["hooks"] == []
