"""Precision per expert: the exact choice is brute force's, the greedy one is within its bound, files come back."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.placement.placement import Placement, index_order
from moeplace.placement.tiers.precision import (
    PrecisionCosts,
    choose,
    load_precision,
    plan_precision,
    save_precision,
)
from moeplace.profiling.errors import FormatError, InputError

NAMES = ("exact", "int8", "int4")


def instance(draw: np.random.Generator, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) bytes that fall and errors that mostly rise, some of them not worth having."""
    bytes_NP = np.sort(draw.integers(1, 40, (experts, 3)), axis=1)[:, ::-1] * int(draw.integers(1, 4))
    error_NP = np.sort(draw.random((experts, 3)), axis=1)
    error_NP[:, 0] = 0.0
    if draw.random() < 0.3:
        error_NP[:, 1:] = error_NP[:, :0:-1]
    return bytes_NP, error_NP


def brute_force(bytes_NP: np.ndarray, error_NP: np.ndarray, budget: int) -> float:
    best = float("inf")
    for choice in itertools.product(range(3), repeat=len(bytes_NP)):
        rows = range(len(choice))
        if sum(bytes_NP[n, choice[n]] for n in rows) <= budget:
            best = min(best, sum(error_NP[n, choice[n]] for n in rows))
    return best


def test_choices_of_one_rank(dated_seed: int) -> None:
    """Exactly: brute force. Greedily: it fits, and the bound lies below the optimum, the choice above it."""
    draw = np.random.default_rng(dated_seed)
    for _ in range(60):
        bytes_NP, error_NP = instance(draw, int(draw.integers(1, 7)))
        least, most = int(bytes_NP.min(axis=1).sum()), int(bytes_NP.max(axis=1).sum())
        budget = int(draw.integers(least, most + 10))
        optimum = brute_force(bytes_NP, error_NP, budget)
        for states in (10**6, 0):
            found = choose(bytes_NP, error_NP, budget, most_states=states)
            rows = np.arange(len(bytes_NP))
            assert bytes_NP[rows, found.choice_N].sum() <= budget
            error = error_NP[rows, found.choice_N].sum()
            assert error >= optimum - 1e-12
            assert found.bound <= optimum + 1e-12
            if states:
                assert error == pytest.approx(optimum)
                assert found.bound == pytest.approx(optimum)


def test_more_room_than_all_is_exact() -> None:
    """Nothing is spoiled that need not be, by either way."""
    bytes_NP, error_NP = instance(np.random.default_rng(0), 20)
    for states in (10**6, 0):
        found = choose(bytes_NP, error_NP, 10**9, most_states=states)
        assert error_NP[np.arange(20), found.choice_N].sum() == 0
        assert found.bound == 0


def costs(seed: int, *, layers: int = 2, experts: int = 6) -> PrecisionCosts:
    draw = np.random.default_rng(seed)
    error_LEP = np.sort(draw.random((layers, experts, 3)), axis=2)
    error_LEP[:, :, 0] = 0
    bytes_LEP = np.broadcast_to(np.array([400, 210, 110]), error_LEP.shape)
    return PrecisionCosts(NAMES, bytes_LEP, error_LEP, np.full(layers, experts))


def test_every_rank_keeps_its_budget(dated_seed: int) -> None:
    """Ranks are planned by themselves: what one has to spare does not help another."""
    found, placement = costs(dated_seed), index_order(np.full(2, 6), np.array([2, 4]), np.zeros(2, int))
    plan = plan_precision(found, placement, np.array([1700, 2000]))
    assert (plan.bytes_R <= [1700, 2000]).all()
    assert (plan.choice_LE[:, :2] == 0).all()  # four experts of 400 bytes
    assert plan.lower_bound == pytest.approx(plan.error)
    alone = brute_force(found.bytes_LEP[:, 2:].reshape(-1, 3), found.error_LEP[:, 2:].reshape(-1, 3), 2000)
    assert plan.error == pytest.approx(alone)
    assert sum(plan.counts().values()) == 12
    with pytest.raises(InputError, match="rank 1 has a budget of 879 bytes, its experts take at least 880"):
        plan_precision(found, placement, np.array([1700, 879]))
    assert plan_precision(found, placement, np.array([440, 880])).counts() == {"exact": 0, "int8": 0, "int4": 12}
    with pytest.raises(InputError, match="another number of layers"):
        plan_precision(found, index_order(np.full(3, 6), np.array([6]), np.zeros(1, int)), np.array([9999]))
    twice = Placement(np.array([[0, 1, 0, 2]] * 2), np.array([2, 2]), np.zeros(2, int), np.full(2, 3))
    with pytest.raises(InputError, match="without replicas"):
        plan_precision(costs(0, experts=3), twice, np.array([9999, 9999]))


def wrong_values(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A part of a file, and what cannot be there: every number of it as another kind of number, or none."""
    for name in ("experts_per_layer", "precision", "bytes", "bytes_per_rank", "predicted_error", "lower_bound"):
        value = np.array(document[name])
        for wrong in (10**400, float("inf"), float("nan"), -1, "x", None, {}):
            if not (name == "bytes_per_rank" and wrong == -1):  # which a plan only reports
                yield name, np.full(value.shape, wrong, object).tolist()
        if value.dtype.kind == "i":
            yield name, (value + 0.5).tolist()
    yield "bytes", np.zeros((2, 6, 3), int).tolist()
    yield "precisions", 5
    yield "precisions", ["int8", "exact", "int4"]
    yield "precisions", ["exact", "int4", "int4"]
    yield "experts_per_layer", [[6, 6], [6, 6]]
    yield "lower_bound", document["predicted_error"] + 1
    yield "predicted_error", 1.01 * document["predicted_error"]
    yield "precision", np.zeros_like(document["precision"]).tolist()  # exact ones spoil nothing


def test_files_come_back(tmp_path: Path) -> None:
    """What was saved is what is read; damaged and foreign files are named."""
    plan = plan_precision(costs(3), index_order(np.full(2, 6), np.array([3, 3]), np.zeros(2, int)), np.full(2, 1500))
    path = tmp_path / "p.json"
    save_precision(path, plan)
    again = load_precision(path)
    assert np.array_equal(again.choice_LE, plan.choice_LE)
    assert np.array_equal(again.bytes_R, plan.bytes_R)
    assert np.array_equal(again.costs.error_LEP, plan.costs.error_LEP)
    assert (again.error, again.lower_bound, again.costs.names) == (plan.error, plan.lower_bound, NAMES)
    document = json.loads(path.read_text())
    for damaged in (
        {**document, "format": "moeplace.placement/1"},
        {key: value for key, value in document.items() if key != "bytes"},
        {**document, "precision": [[9] * 6] * 2},
        {**document, "error": [[[0.0, -1.0, 0.0]] * 6] * 2},
        *({**document, name: value} for name, value in wrong_values(document)),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(FormatError, match="is not a file of precisions"):
            load_precision(path)
