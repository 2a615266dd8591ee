"""Figures of a service: sums that only rise, balance of the generation in force."""

import numpy as np

from moeplace.runtime.service.coordinator.figures import ServiceFigures


def test_balance_begins_anew_with_a_generation() -> None:
    """What ranks computed before it, on other experts, says nothing about it; totals keep it."""
    figures = ServiceFigures()
    assert figures.imbalance_per_layer((0, 1)) == ()
    figures.report(0, {"steps": 3, "bytes": {"a": 1}}, [90, 10], [[1, 2]])
    figures.report(1, {"steps": 4, "bytes": {"b": 2}}, [10, 10], [[3, 4]])
    assert figures.imbalance_per_layer((0, 1)) == (1.8, 1.0)
    figures.begin_generation()
    figures.report(0, {"steps": 5, "bytes": {"a": 2}}, [100, 40], [[2, 2]])
    figures.report(1, {"steps": 5, "bytes": {"b": 2}}, [20, 20], [[3, 4]])
    assert figures.imbalance_per_layer((0, 1)) == (1.0, 1.5)
    assert figures.counters() == {"steps": 10, "bytes": {"a": 2, "b": 2}}
    load = figures.load()
    assert load is not None
    np.testing.assert_array_equal(load, [[5, 6]])
