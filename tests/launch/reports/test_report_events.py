"""The Pareto front and the timeline of the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeplace.launch.cli import DONE, FAILED, main
from moeplace.launch.reports.front_chart import front_chart, front_table, fronts_from_json
from moeplace.launch.reports.timeline import Bar, bars_between, event_table, timeline_chart
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.errors import FormatError
from moeplace.profiling.traces.file import save_trace
from moeplace.runtime.event import Event
from moeplace.runtime.replanning.event_log import EventLog
from tests.launch.reports.pages import check_page, make_trace, striped


def run(solver: str, imbalance: float, traffic: float, cap: float | None = None, trace: str = "a/t") -> dict[str, Any]:
    figures = {"imbalance_mean": imbalance, "ranks_per_token": traffic, "copies_per_token": 2 * traffic}
    return {"trace": trace, "solver": solver, "max_imbalance": cap, **figures}


def test_the_front_is_what_nothing_beats() -> None:
    """Of two caps the loose one has less traffic, the tight one less imbalance; both beat the rest."""
    runs = [
        run("auto", 1.02, 3.1, 1.05),
        run("auto", 1.1, 2.9, 1.2),
        run("lpt", 1.03, 3.3, 1.05),
        run("auto", 1.2, 3.0),
    ]
    [front] = fronts_from_json({"mode": "dispatch-combine", "runs": runs}, "f")
    assert front.trace == "t"
    assert [(p.name, p.is_best) for p in front.points] == [
        ("auto, cap 1.05", True),
        ("lpt", False),  # a cap that was not swept says nothing
        ("auto, cap 1.2", True),
        ("auto", False),
    ]
    assert front_chart(front).count('class="bar first"') == 2
    assert front_table(front).count("<tr>") == 5


def test_one_front_per_trace_in_the_unit_of_the_mode() -> None:
    """Copies are counted in coherent mode; a single point has axes too."""
    runs = [run("auto", 1.1, 2.0), run("auto", 1.1, 2.0, trace="u")]
    fronts = fronts_from_json({"mode": "coherent", "runs": runs}, "f")
    assert [(front.trace, front.unit, front.points[0].traffic) for front in fronts] == [
        ("t", "copies per token", 4.0),
        ("u", "copies per token", 4.0),
    ]
    assert "nan" not in front_chart(fronts[0])


@pytest.mark.parametrize("document", [{}, [], {"mode": "coherent", "runs": []}, {"mode": "coherent", "runs": [{}]}, 3])
def test_what_is_no_sweep_is_refused(document: Any) -> None:
    """One sentence with the name of the file."""
    with pytest.raises(FormatError, match=r"sweep\.json is not the JSON of `moeplace compare`"):
        fronts_from_json(document, "sweep.json")


def event(time: float, kind: str, **figures: Any) -> Event:
    return Event(time, kind, f"about <{kind}>", figures, step=int(10 * time))


HISTORY = [
    event(0, "watching"),
    event(1, "review-started"),
    event(2, "kept", seconds_per_step=1e-3, promised_seconds=1e-3),
    event(3, "review-started"),
    event(5, "move", seconds_per_step=2e-3, promised_seconds=None),
    event(6, "committed", promised_seconds=1.2e-3),
    event(7, "review-started"),
    event(8, "review-failed"),
    event(8.5, "rank-lost"),
    event(9, "move"),
]


def test_bars_last_from_start_to_outcome() -> None:
    """What never ended lasts until the last event."""
    ends = {"kept": "", "move": "good", "review-failed": "bad"}
    assert bars_between(HISTORY, "review-started", ends, "time") == [Bar(1, 2, ""), Bar(3, 5, "good"), Bar(7, 8, "bad")]
    assert bars_between(HISTORY, "move", {"committed": "good"}, "time") == [Bar(5, 6, "good"), Bar(9, 9, "")]


def test_timeline_draws_every_lane() -> None:
    """Reviews, migrations, what else happened, and the predicted step above; also where there is only a little."""
    drawing = timeline_chart(HISTORY)
    assert drawing.count('class="event good"') == 2
    assert drawing.count('class="event bad"') == 1
    assert 'class="mark"' in drawing
    assert 'class="seen"' in drawing
    assert 'class="front"' in drawing
    for events in (HISTORY[:1], HISTORY[:3], [Event(5, "kept", "", step=step) for step in (1, 90)]):
        assert "nan" not in timeline_chart(events)
    assert "steps since the first event" in timeline_chart([Event(5, "kept", "", step=step) for step in (1, 90)])


def test_table_tells_decisions_and_counts_routine() -> None:
    """A decision taken again and again is one row; long histories lose their oldest rows, and say so."""
    table = event_table(HISTORY)
    assert "about &lt;committed&gt;" in table
    assert "review-started" not in table
    assert "1 looks found nothing to do." in table
    repeated = [event(number, "candidate-kept") for number in range(5)]
    assert event_table(repeated).count("<tr>") == 1
    assert "(5 times, the last:)" in event_table(repeated)
    long = [event(number, ("move", "committed")[number % 2]) for number in range(100)]
    assert "60 earlier decisions are left out" in event_table(long)


def test_report_command_draws_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--sweep and --events reach the page; files that are something else are named, and nothing is written."""
    trace = make_trace(layers=3, experts=8)
    save_trace(tmp_path / "t.trace", trace)
    save_placement(tmp_path / "p.json", striped(trace, 2))
    (tmp_path / "s.json").write_text(json.dumps({"mode": "dispatch-combine", "runs": [run("auto", 1.1, 2.0)]}))
    with EventLog(tmp_path / "e.jsonl", clock=lambda: 1.0) as log:
        log.add("watching", "it begins", step=0)
        log.add("move", "a <reason>", step=7, gain=0.1)
    base = ["report", str(tmp_path / "t.trace"), "--placement", str(tmp_path / "p.json")]
    page = tmp_path / "r.html"
    flags = ["--sweep", str(tmp_path / "s.json"), "--events", str(tmp_path / "e.jsonl"), "--out", str(page)]
    assert main([*base, *flags]) == DONE
    words = check_page(page.read_text())
    for part in ("Traffic against balance", "Re-placement while serving", "a <reason>", "1 auto"):
        assert part in words
    page.unlink()
    (tmp_path / "none.jsonl").write_text("")
    for flag, name, reason in (
        ("--sweep", "e.jsonl", "not JSON"),
        ("--events", "s.json", "is not an event"),
        ("--events", "none.jsonl", "has no events"),
    ):
        assert main([*base, flag, str(tmp_path / name), "--out", str(page)]) == FAILED
        assert reason in capsys.readouterr().err
        assert not page.exists()
