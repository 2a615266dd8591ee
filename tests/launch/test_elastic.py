"""The elastic benchmark: its seeded load, its figures, and a small run on two ranks."""

from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.launch.elastic_bench import require_undisturbed, step_figures
from moeplace.launch.elastic_load import ElasticJob, exchange_slots
from moeplace.placement.cluster import even_slots
from moeplace.placement.placement import index_order
from moeplace.placement.relabel import moves
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.files import read_json


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_a_quarter_of_the_slots_changes_hands(ranks: int) -> None:
    """Every exchanged expert changes its rank, and as many slots as asked for change in every layer."""
    old = index_order(np.full(3, 16), even_slots(16, ranks), np.zeros(ranks, np.int64))
    new = exchange_slots(old, share=0.25, rng=np.random.default_rng(0))
    changed_L = (old.slot_to_expert != new.slot_to_expert).sum(axis=1)
    assert np.isin(changed_L, (4, 5)).all()
    np.testing.assert_array_equal(moves(old, new), changed_L)


def test_the_load_follows_from_the_seed() -> None:
    """Equal seeds give equal requests, moments and placements; another seed others; out of range is refused."""
    job, same, other = (ElasticJob("model", seed=seed) for seed in (3, 3, 4))
    first = index_order(np.full(2, 16), even_slots(16, 4), np.zeros(4, np.int64))
    assert job.moments() == same.moments() == sorted(job.moments())
    assert job.request(7, vocabulary=50) == same.request(7, vocabulary=50) != other.request(7, vocabulary=50)
    digests = [[placement.digest for placement in j.placements(first)] for j in (job, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(set(digests[0])) == job.replacements + 1
    with pytest.raises(InputError, match=r"ranks \(1\) must be at least 2"):
        ElasticJob("model", ranks=1)
    with pytest.raises(InputError, match=r"replacements \(201\) must not exceed the steps \(200\)"):
        ElasticJob("model", replacements=201)


def test_figures_of_steps() -> None:
    """Worked by hand: quiet steps of 1, 1 and 2 s with 4 tokens each, moving ones of 1 and 3 s."""
    figures = step_figures([1, 1, 2, 1, 3], [4, 4, 4, 4, 4], [False, False, False, True, True])
    assert figures["median_step_seconds"] == 1
    assert figures["worst_step_ratio"] == 3
    assert figures["worst_step_ratio_quiet"] == 2
    assert figures["throughput_ratio"] == (8 / 4) / (12 / 4)
    assert step_figures([1.0], [4], [False])["worst_step_ratio"] is None


def test_lost_and_changed_requests_fail() -> None:
    """One sentence with both counts."""
    require_undisturbed({"requests": 3, "lost": 0, "changed": 0})
    with pytest.raises(MoeplaceError, match="of 3 requests, 1 were lost and 2 have other tokens"):
        require_undisturbed({"requests": 3, "lost": 1, "changed": 2})


@pytest.mark.parametrize("flag", ["--joins", "--leaves", "--kills"])
def test_changes_of_membership_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with one sentence, before anything starts."""
    assert main(["bench", "elastic", flag, "1"]) == 2
    assert "--joins, --leaves and --kills must be 0" in capsys.readouterr().err


def test_two_ranks_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tokens are those of the undisturbed process, and everything planned has moved."""
    out = tmp_path / "elastic.json"
    options = ["--ranks", "2", "--steps", "12", "--replacements", "1", "--batch", "4", "--bytes-per-step", "500000"]
    assert main(["bench", "elastic", *options, "--mode", "coherent", "--json", str(out)]) == 0
    report = read_json(out)
    assert (report["lost"], report["changed"]) == (0, 0)
    assert report["requests"] > 4
    assert report["events"] == {"replacements": 1, "joins": 0, "leaves": 0, "kills": 0}
    assert report["bytes_replaced"] == report["bytes_replaced_planned"] > 0
    assert report["seconds_from_kill_to_token"] == []
    assert "1 replacements" in capsys.readouterr().out
