"""Figures of a service: sums that only rise, balance of the generation in force."""

from collections import Counter

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


def test_one_assignment_alone_is_uneven() -> None:
    """Of two ranks one has computed, however little; and what is told of the caches is kept."""
    figures = ServiceFigures()
    figures.report(0, {}, [1], [[1]])
    figures.report(1, {}, [0], [[0]])
    assert figures.imbalance_per_layer((0, 1)) == (2.0,)
    figures.note_pass("decode", 0.5, [3, 8])
    figures.note_pass("decode", 0.25, [1, 2, 3])
    known = figures.passes()
    assert known == {"passes": {"decode": 2}, "pass_seconds": {"decode": 0.75}, "kv_used": 3, "kv_room": 8}


def test_members_that_are_gone_count_and_cost_nothing(dated_seed: int) -> None:
    """Of a service in which members come and go all the time: sums as if all were there, kept for those that are."""
    rng, figures = np.random.default_rng(dated_seed), ServiceFigures()
    last: dict[int, tuple[Counter[str], np.ndarray]] = {}
    alive, started = [0, 1, 2], 3
    for _ in range(60):
        for member in alive:
            counted, load = last.get(member, (Counter(), np.zeros((2, 3), np.int64)))
            last[member] = counted + Counter(steps=int(rng.integers(1, 9)), a=2), load + rng.integers(0, 5, (2, 3))
            counters = {"steps": last[member][0]["steps"], "bytes": {"a": last[member][0]["a"]}}
            figures.report(member, counters, last[member][1].sum(axis=1).tolist(), last[member][1].tolist())
        before = figures.imbalance_per_layer(alive)
        dead = int(rng.choice(alive))
        figures.note_end(dead)
        assert figures.imbalance_per_layer(alive) == before  # until others serve
        alive, started = [*(member for member in alive if member != dead), started], started + 1
        figures.begin_generation()
        total = sum((counted for counted, _ in last.values()), Counter())
        assert figures.counters() == {"steps": total["steps"], "bytes": {"a": total["a"]}}
        np.testing.assert_array_equal(figures.load(), sum(load for _, load in last.values()))  # type: ignore[arg-type]
        assert figures.imbalance_per_layer(alive) == (1.0, 1.0)
        kept = (figures._counters, figures._load, figures._tokens, figures._tokens_before)
        assert max(map(len, kept)) <= len(alive)
