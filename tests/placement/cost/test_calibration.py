"""Calibration files, and the time of experts that both evaluation and runtime predict with."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.seconds import collective_latency, expert_seconds
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import index_order
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.trace import RoutingTrace

MEASURED = Calibration(
    Link(1e-5, 2e9), Link(3e-5, 1e9, 1.5e9), ExpertTime(1e-6, 2e-9, 3e-7), 4e-6, {"coherent": -5e-7}, 0.25,
    {"ranks": 4},
)  # fmt: skip


@pytest.mark.parametrize("calibration", [MEASURED, Calibration()])
def test_what_is_written_is_read(tmp_path: Path, calibration: Calibration) -> None:
    """Every field comes back; an infinite bandwidth is null in the file."""
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["intra"]["node_bandwidth"] is None
    assert (document["inter"]["node_bandwidth"] is None) == (calibration is not MEASURED)


def test_what_is_no_calibration(tmp_path: Path) -> None:
    """A foreign file, a missing part, a value out of range: each by name."""
    path, document = tmp_path / "c.json", MEASURED.to_json()
    for wrong, kind, message in (
        ({**document, "format": "moeplace.plan/1"}, FormatError, "lacks the tag"),
        ([document], FormatError, "lacks the tag"),
        ({name: value for name, value in document.items() if name != "inter"}, FormatError, "not a calibration file"),
        ({**document, "expert": {"fixed": -1.0}}, InputError, "must not be negative"),
        ({**document, "kv_exposed": "much"}, FormatError, "not a calibration file"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(kind, match=message):
            Calibration.load(path)
    older = {name: document[name] for name in ("format", "intra", "inter", "expert")}
    path.write_text(json.dumps(older))
    assert Calibration.load(path).other_seconds_per_layer == 0.0
    assert Calibration.load(path).kv_exposed is None


def test_overheads_by_mode_and_form() -> None:
    """What was measured for a mode, else for all."""
    assert MEASURED.layer_overhead("coherent") == -5e-7
    assert MEASURED.layer_overhead("allgather") == 4e-6
    assert MEASURED.apply(Cluster.uniform(2, slots_per_rank=1)).inter == MEASURED.inter


def test_sizes_other_than_measured_are_told_beyond_two_percent() -> None:
    """A size that a side does not know is no difference."""
    measured = replace(MEASURED, conditions={"expert_bytes": 1000, "batch": 64, "hidden_size": 0})
    wanted = {"expert_bytes": 985.0, "batch": 60, "hidden_size": 128, "kv_dim": 8}
    assert measured.other_sizes(wanted) == {"batch": (64, 60)}
    assert measured.other_sizes({"expert_bytes": 1015.0, "batch": 0}) == {}
    assert measured.other_sizes({"expert_bytes": 970.0}) == {"expert_bytes": (1000, 970.0)}


@pytest.mark.parametrize("name", ["batch", "hidden_size", "dtype_bytes"])
def test_sizes_of_a_step(name: str) -> None:
    """At least 1 each; no K/V is fine."""
    assert StepShape(**{name: 1}, kv_dim=0).kv_dim == 0
    for wrong in ({name: 0}, {"kv_dim": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            StepShape(**wrong)


def test_the_slowest_rank_decides_in_every_step() -> None:
    """Tokens and activated experts add up, slow ranks take longer, steps are averaged."""
    cluster = Cluster(np.zeros(2, int), np.ones(2), np.array([1.5, 0.5]))
    tokens, activated = np.array([[4, 1], [2, 2]]), np.array([[1, 1], [2, 1]])
    # Step 0: (4 x 2 + 3) / 1.5 = 22/3 against (2 + 3) / .5 = 10; step 1: 10 / 1.5 against 7 / .5 = 14.
    assert expert_seconds(tokens, activated, cluster, ExpertTime(1.0, 2.0, 3.0)) == pytest.approx(1 + (10 + 14) / 2)
    assert expert_seconds(tokens[1], activated[1], cluster, ExpertTime(1.0, 2.0, 3.0)) == pytest.approx(15)


def test_latency_of_the_farthest_tier() -> None:
    """None on one rank, the node's inside it, else that between nodes."""
    links = {"intra": Link(1.0, 1.0), "inter": Link(2.0, 1.0)}
    for ranks, per_node, latency in ((1, 1, 0.0), (2, 2, 1.0), (2, 1, 2.0)):
        assert collective_latency(Cluster.uniform(ranks, slots_per_rank=1, ranks_per_node=per_node, **links)) == latency


def test_counts_of_travelling_tokens() -> None:
    """Every pair of known primary experts counts once; two steps of two lanes are averaged."""
    ids = np.array([[[0], [1]], [[1], [1]], [[-1], [0]], [[3], [2]]])
    placement = index_order(np.full(2, 4), np.full(2, 2), np.zeros(2, int))
    result = evaluate(RoutingTrace(ids, np.full(2, 4)), placement, mode="coherent", shape=StepShape(batch=2))
    assert result.travel_RR.tolist() == [[2, 0], [0, 1]]
    assert result.stay_L.tolist() == [1.0]
    # Layer 0: steps {0 on rank 0, none}, {1 on rank 0, 3 on rank 1}: 2 and 1. Layer 1: {1, 0}, {1, 2}: 2 and 1.
    assert result.step_imbalance_mean == pytest.approx(1.5)
    assert result.activated_imbalance_mean == pytest.approx(1.5)
