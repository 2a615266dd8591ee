"""Rules of the nouns that no solver shows: types that cannot change, files key by key, shapes that do not fit."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.prices import LinkPrices
from moeplace.placement.cost.steps import StepShape, default_shape
from moeplace.placement.objective import load_imbalance, survival_deficit
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import load_placement_file, save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import SolveResult
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.trace import RoutingTrace

ROOT = Path(__file__).resolve().parents[2]
GROWING = {"Bundle", "Copy", "Search"}
"""Types that change: links between bundles and copies grow while a migration is planned, a search keeps its state."""


def dataclasses_of_placement() -> list[type]:
    """Every dataclass of the floor."""
    found = []
    for path in sorted((ROOT / "placement").rglob("*.py")):
        if path.name == "__init__.py" or "@dataclass" not in path.read_text():
            continue
        module = importlib.import_module("moeplace." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
        for _, kind in inspect.getmembers(module, dataclasses.is_dataclass):
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                found.append(kind)
    return found


def test_nouns_cannot_change_and_arrays_are_not_compared() -> None:
    """Frozen, but for private ones and what says in its docstring that it changes; no `==` that would be an array."""
    kinds = dataclasses_of_placement()
    assert len(kinds) > 60
    for kind in kinds:
        parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
        if not kind.__name__.startswith("_"):
            assert parameters.frozen or kind.__name__ in GROWING, kind
        arrays = [each.name for each in dataclasses.fields(kind) if has_arrays(str(each.type))]
        assert not (arrays and parameters.eq), f"{kind} compares {arrays}"


def has_arrays(kind: str) -> bool:
    """Whether a field of that type is an array, or a mapping to arrays."""
    return "ndarray" in kind and not kind.startswith("collections.abc.")


def placement_of(**changes: Any) -> Placement:
    fields = {
        "slot_to_expert": np.array([[0, 1, 2], [2, 0, 1]]),
        "slots_of_rank": np.array([2, 1]),
        "node_of_rank": np.array([0, 1]),
        "experts_per_layer": np.array([3, 3]),
    }
    return Placement(**{**fields, **changes})


@pytest.mark.parametrize(("changes", "words"), [
    ({"slots_of_rank": np.array([4, -1])}, r"each layer has 3 slots, but the ranks hold \[4, -1\]"),
    ({"slots_of_rank": np.array([1, 1])}, "each layer has 3 slots"),
    ({"slots_of_rank": np.array([[2, 1]])}, "each layer has 3 slots"),
    ({"node_of_rank": np.array([0, 2])}, "nodes must be consecutive"),
    ({"node_of_rank": np.array([1, 1])}, "nodes must be consecutive"),
    ({"node_of_rank": np.array([0])}, "nodes must be consecutive"),
    ({"experts_per_layer": np.array([3])}, "experts_per_layer must have 2 entries"),
])  # fmt: skip
def test_shapes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        placement_of(**changes)


def test_placement_files_key_by_key(tmp_path: Path) -> None:
    """Keys that are left out where they say nothing, and objects that must be objects."""
    path = tmp_path / "p.json"
    save_placement(path, placement_of(), solver={"name": "x"}, evidence={"split": "test"})
    text = path.read_text()
    assert (text[:2], text[-2:]) == ("{\n", "}\n")
    document = json.loads(text)
    assert "experts_per_layer" not in document
    assert (document["slots_per_rank"], document["ranks_per_node"]) == ([2, 1], 1)
    for ragged in ([3, 2], [2, 3]):
        rows = np.array([[0, 1, 2 if e == 3 else -1] for e in ragged])
        save_placement(path, placement_of(slot_to_expert=rows, experts_per_layer=np.array(ragged)))
        assert json.loads(path.read_text())["experts_per_layer"] == ragged
        assert load_placement_file(path).placement.experts_per_layer.tolist() == ragged
    for key in ("solver", "evidence"):
        path.write_text(json.dumps({**document, key: ["no object"]}))
        with pytest.raises(FormatError, match="solver and evidence must be objects"):
            load_placement_file(path)


def test_a_summary_says_what_moved_only_where_something_was_before() -> None:
    result = SolveResult(placement_of(), "auto", 0, "traffic", 1.0, 1.0, 0.0, "optimal", 0.1)
    assert not {"moved", "notes"} & set(result.summary())
    told = dataclasses.replace(result, moved={"bytes": 0.0}, notes=("said",)).summary()
    assert (told["moved"], told["notes"], told["name"]) == ({"bytes": 0.0}, ["said"], "auto")


def test_imbalance_of_loads_by_hand() -> None:
    """A load is shared evenly over replicas, and time is load over speed."""
    cluster = Cluster(np.array([0, 0]), np.array([2, 2]), np.array([1.0, 3.0]))
    problem = Problem.from_load(np.array([[6.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), cluster)
    placement = problem.placement(np.array([[0, 2, 0, 1], [0, 1, 0, 2]]))
    assert load_imbalance(problem, placement).tolist() == [3.0 / (8 / 4), 1.0]
    alone = problem.placement(np.array([[0, -1, 1, 2], [0, 1, 0, 2]]))
    assert load_imbalance(problem, alone)[0] == 6.0 / (8 / 4)
    assert survival_deficit(problem, alone) == 0
    wanted = Problem.from_load(np.ones((1, 2)), Cluster.uniform(4, slots_per_rank=2, ranks_per_node=2), survive=1)
    for row, missing in (
        ([0, 1, 0, 1, 0, 1, 0, 1], 0),
        ([0, 1, 0, 1, -1, -1, -1, -1], 2),
        ([0, 1, -1, -1, 1, -1, -1, -1], 2),
    ):
        assert survival_deficit(wanted, wanted.placement(np.array([row]))) == missing


def test_nominal_sizes_and_times() -> None:
    """What `docs` and predictions without a calibration rest on; a trace's own sizes go first."""
    assert dataclasses.astuple(ExpertTime()) == (10e-6, 45e-9, 6e-6)
    assert Calibration().layer_overhead("coherent") == 0.0
    timed = Calibration(other_seconds_per_layer=2.0, mode_seconds_per_layer={"coherent": 3.0})
    assert (timed.layer_overhead("coherent"), timed.layer_overhead("allgather")) == (3.0, 2.0)
    trace = RoutingTrace(np.zeros((2, 1, 1), np.int64), np.array([2]))
    assert default_shape(trace) == StepShape(hidden_size=StepShape().hidden_size, kv_dim=StepShape().kv_dim)
    sized = dataclasses.replace(trace, hidden_size=96, kv_dim=24)
    assert (default_shape(sized).hidden_size, default_shape(sized).kv_dim) == (96, 24)


def test_prices_of_links_are_numbers_everywhere() -> None:
    """One rank, one rank a node, nodes of one and of several ranks with distances."""
    lone = np.array([[0.0, 2.0, 6.0], [2.0, 0.0, 6.0], [6.0, 6.0, 0.0]])
    for cluster in (
        Cluster.uniform(1, slots_per_rank=2),
        Cluster.uniform(3, slots_per_rank=2, ranks_per_node=1),
        Cluster(np.array([0, 0, 1]), np.full(3, 2), np.ones(3)).replace(distance_RR=lone),
    ):
        prices = LinkPrices.of(cluster)
        for array in (prices.rank_R, prices.node_N, prices.pair_RR):
            assert np.isfinite(array).all()
    assert prices.rank_R.tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(prices.pair_RR, cluster.cost_RR / cluster.cost_RR[0, 1])
    np.testing.assert_allclose(prices.node_N, prices.pair_RR[0, 2] - 1)


@pytest.mark.parametrize(
    ("experts", "shown"), [([3, 3, 3, 3], r"\[3, 3, 3, 3\]"), ([3] * 5, r"\[3, 3, \.\.\., 3\] \(5\)")]
)
def test_another_model_is_shown_in_few_words(experts: list[int], shown: str) -> None:
    layers = len(experts)
    placement = Placement(np.tile(np.arange(3), (layers, 1)), np.array([3]), np.array([0]), np.array(experts))
    trace = RoutingTrace(np.zeros((2, layers, 1), np.int64), np.full(layers, 2))
    with pytest.raises(InputError, match=shown):
        evaluate(trace, placement)
