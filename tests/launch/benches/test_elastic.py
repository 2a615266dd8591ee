"""The elastic benchmark: its seeded load, its figures, and a small run on two ranks."""

import math
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.benches import elastic
from moeplace.launch.benches.elastic import require_undisturbed, seconds_to_token, step_figures
from moeplace.launch.benches.elastic_load import ElasticJob, exchange_slots
from moeplace.launch.cli import main
from moeplace.placement.cluster import even_slots
from moeplace.placement.migration.relabel import moves
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.files import read_json
from moeplace.runtime.event import Event
from tests.runtime.forked_members import ForkingSpawner
from tests.seeds import TODAY


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_a_quarter_of_the_slots_changes_hands(ranks: int) -> None:
    """Every exchanged expert changes its rank, and as many slots as asked for change in every layer."""
    old = index_order(np.full(3, 16), even_slots(16, ranks), np.zeros(ranks, np.int64))
    new = exchange_slots(old, share=0.25, rng=np.random.default_rng(0))
    changed_L = (old.slot_to_expert != new.slot_to_expert).sum(axis=1)
    assert np.isin(changed_L, (4, 5)).all()
    np.testing.assert_array_equal(moves(old, new), changed_L)


@pytest.mark.parametrize("seed", [*range(30), TODAY])
def test_slots_change_hands_whatever_ranks_hold(seed: int) -> None:
    """Uneven ranks, empty slots, experts on several ranks: the result is a placement (which no rank holding an expert
    twice is), what is there once moves to another rank, and something moves where two ranks have such experts."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    ranks, experts, layers = int(rng.integers(2, 6)), 12, 3
    slots = rng.integers(4, 13, ranks)
    slots[-1] = 12
    starts = np.cumsum(slots) - slots
    held_LS = np.full((layers, slots.sum()), -1, np.int32)
    for row in held_LS:
        for start, size in zip(starts[:-1], slots[:-1], strict=True):
            own = rng.permutation(experts)[: rng.integers(size + 1)]
            row[start : start + len(own)] = own
        missing = np.setdiff1d(np.arange(experts), row)
        row[starts[-1] : starts[-1] + len(missing)] = missing
    old = Placement(held_LS, slots, np.zeros(ranks, np.int64), np.full(layers, experts))
    new = exchange_slots(old, share=0.25, rng=rng)
    for before, after in zip(old.slot_to_expert, new.slot_to_expert, strict=True):
        rank_of_slot = np.repeat(np.arange(ranks), slots)
        changed = np.flatnonzero(before != after)
        assert sorted(before) == sorted(after)
        for slot in changed:
            assert (before == before[slot]).sum() == 1
            assert rank_of_slot[slot] != rank_of_slot[np.flatnonzero(after == before[slot])[0]]
        single = {rank_of_slot[slot] for slot in np.flatnonzero(before >= 0) if (before == before[slot]).sum() == 1}
        assert (len(changed) > 0) is (len(single) > 1)


def test_the_load_follows_from_the_seed() -> None:
    """Equal seeds give equal requests and changes; another seed others; out of range is refused."""
    job, same, other = (ElasticJob("model", joins=2, leaves=3, kills=2, seed=seed) for seed in (3, 3, 4))
    assert job.changes() == same.changes() != other.changes()
    assert job.request(7, vocabulary=50) == same.request(7, vocabulary=50) != other.request(7, vocabulary=50)
    with pytest.raises(InputError, match=r"ranks \(1\) must be at least 2"):
        ElasticJob("model", ranks=1)
    with pytest.raises(InputError, match=r"changes \(201\) must not exceed the steps \(200\)"):
        ElasticJob("model", replacements=201)
    with pytest.raises(InputError, match="at least 2 must stay"):
        ElasticJob("model", ranks=2, leaves=1)


@pytest.mark.parametrize("seed", range(20))
def test_changes_happen_as_often_as_asked_for(seed: int) -> None:
    """Their steps rise, and a rank never leaves where only two are."""
    job = ElasticJob("model", ranks=2, replacements=5, joins=4, leaves=4, kills=3, seed=seed)
    changes = job.changes()
    assert [change.step for change in changes] == sorted({change.step for change in changes})
    kinds = Counter(change.kind for change in changes)
    assert kinds == {"replacement": 5, "join": 4, "leave": 4, "kill": 3}
    steps = [{"join": 1, "leave": -1}.get(change.kind, 0) for change in changes]
    assert min(accumulate(steps, initial=2)) >= 2


def test_figures_of_steps() -> None:
    """Worked by hand: quiet steps of 1, 1 and 2 s on 2 ranks and of 10 s on 3, moving ones of 1 and 3 s on 2."""
    moving = [False, False, False, True, True, False]
    figures = step_figures([1, 1, 2, 1, 3, 10], [4] * 6, moving, [2, 2, 2, 2, 2, 3])
    assert figures["median_step_seconds"] == 1.5
    assert figures["worst_step_ratio"] == 3
    assert figures["median_step_ratio"] == 2
    assert figures["worst_step_ratio_quiet"] == 2
    assert figures["p99_step_ratio"] == pytest.approx(1 + 0.99 * 2)
    assert figures["p99_step_ratio_quiet"] == pytest.approx(1 + 0.97 * 1)  # of 1, 1, 1 and 2 times the usual
    assert figures["throughput_ratio"] == (8 / 4) / (12 / 4)
    assert (figures["steps_quiet"], figures["steps_moving"]) == (4, 2)
    assert step_figures([1.0, 1.0], [4, 4], [False, True], [2, 3])["worst_step_ratio"] is None


def test_lost_and_changed_requests_fail() -> None:
    """One sentence with both counts."""
    require_undisturbed({"requests": 3, "lost": 0, "changed": 0})
    with pytest.raises(MoeplaceError, match="of 3 requests, 1 were lost and 2 have other tokens"):
        require_undisturbed({"requests": 3, "lost": 1, "changed": 2})


def test_seconds_to_token() -> None:
    """Worked by hand: two kills, each counted to the first token after it."""
    events = [Event(time, kind, "") for time, kind in ((1.0, "resumed"), (2.5, "loss"), (3.0, "resumed"))]
    assert seconds_to_token([0.5, 2.0], events) == [0.5, 1.0]
    assert seconds_to_token([4.0], events) == [math.inf]


def test_ranks_come_go_and_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are those of the undisturbed process, everything asked for happened, and no byte too many moved."""
    monkeypatch.setattr(elastic, "LocalSpawner", ForkingSpawner)  # eight starts without an import each
    out = tmp_path / "elastic.json"
    seed = TODAY
    print(f"seed {seed}")
    options = ["--ranks", "2", "--steps", "30", "--replacements", "1", "--joins", "1", "--leaves", "1", "--kills", "1"]
    load = ["--batch", "4", "--bytes-per-step", "500000", "--mode", "coherent", "--probe-tokens", "4"]
    assert main(["bench", "elastic", *options, *load, "--kill-alls", "1", "--seed", str(seed), "--json", str(out)]) == 0
    report = read_json(out)
    assert (report["lost"], report["changed"]) == (0, 0)
    assert report["requests"] > 4
    assert report["events"] == {"replacements": 1, "joins": 1, "leaves": 1, "kills": 1, "kill_alls": 1}
    assert report["bytes_moved"] == report["bytes_lower_bound"] > 0
    assert len(report["seconds_from_kill_to_token"]) == 2
    assert "1 replacements, 1 joins, 1 leaves, 1 kills" in capsys.readouterr().out
