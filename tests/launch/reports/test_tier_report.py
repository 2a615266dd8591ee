"""Fast memory in the report: what sits where, and the curves that people decide by."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.launch.reports.curves import Curve, curve_chart
from moeplace.launch.reports.report import Report, render
from moeplace.launch.reports.tiers import Budgets, TierView, budgets_from_json, seat_chart, twice_active
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HostTier, Memory
from moeplace.placement.placement_file import save_placement
from moeplace.placement.tiers.budgets import BudgetPoint, sweep_budgets
from moeplace.placement.tiers.demand import count_demand
from moeplace.placement.tiers.evaluation import evaluate_tiers
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.residency import with_residency
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.file import save_trace
from tests.launch.reports.pages import check_page, make_trace, striped

MEMORY = Memory(HostTier(bandwidth=1e4), fast_slots=np.full(2, 2), transit=1)
SHAPE = StepShape(batch=2, hidden_size=8, kv_dim=0)


def point(budget: float, policy: str, hit: float, seconds: float, times: float) -> BudgetPoint:
    return BudgetPoint(budget, budget * 8, policy, hit, None, seconds, times)


def view(seed: int) -> TierView:
    trace = make_trace(layers=3, experts=8, top_k=2)
    placement = with_residency(striped(trace, 2), trace, MEMORY, by="load", batch=2, expert_bytes=1.0)
    cluster = Cluster.uniform(2, slots_per_rank=4).replace(memory=MEMORY)
    judged = evaluate_tiers(trace, placement, Policy(), TierTerms(cluster, SHAPE), with_bound=False)
    return TierView("plan", placement, count_demand(trace, batch=2).activation_LE, judged)


def test_the_section_says_what_sits_where() -> None:
    """A line per rank at its residents, every layer and rank explains itself, the answer stands in words."""
    shown = view(0)
    drawing = seat_chart(shown)
    assert drawing.count('class="seen"') == 2
    residents = (shown.placement.tier_LER == 0).sum(axis=1)
    for layer, rank in np.ndindex(residents.shape):
        assert f"MoE layer {layer}, rank {rank}: {residents[layer, rank]} of 4 resident" in drawing
    points = [point(b, "pinned", b, 2 - b, 4 * b) for b in (0.25, 0.5, 1.0)]
    report = Report.of(
        make_trace(layers=3, experts=8, top_k=2), {"plan": shown.placement}, {}, tiers=[shown],
        budgets=[Budgets(points)],
    )  # fmt: skip
    text = check_page(render(report))
    assert "Fast memory" in text
    assert "Twice the active experts are 50% of a rank's" in text
    assert "pinned 50% and 1.5 times the step of the greatest budget" in text


def test_where_twice_the_active_experts_are() -> None:
    """From rows over activated experts; nowhere, if no budget reaches it."""
    assert twice_active([point(b, "lru", 0, 1, 8 * b) for b in (0.125, 0.5)]) == pytest.approx(0.25)
    assert twice_active([point(b, "lru", 0, 1, b) for b in (0.5, 1.0)]) is None
    assert twice_active([]) is None


def test_lines_and_marks_are_where_they_belong() -> None:
    """Points lie in proportion between the axes; a bound is dashed and has no dots."""
    drawing = curve_chart(
        "t", [Curve("a", [(0, 0), (50, 0.5), (100, 1.0)]), Curve("b", [(50, 1.0)], 1, dashed=True)], x_label="x",
        y_label="y", marks={"here": 50},
    )  # fmt: skip
    first = next(part for part in drawing.split("<") if part.startswith('polyline points="') and "c0" in part)
    places = [tuple(map(float, pair.split(","))) for pair in first.split('"')[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert x2 > x0
    assert y0 > y2
    assert f"M{x1:g} " in drawing
    assert drawing.count("<circle") == 3
    assert "a: 0.5 at 50" in drawing


def test_more_fast_memory_is_never_worse() -> None:
    """Pinned residents grow with the budget; at the full budget nothing but the rows for transit is missing."""
    trace = make_trace(layers=3, experts=8, top_k=2)
    cluster = Cluster.uniform(2, slots_per_rank=4).replace(memory=MEMORY)
    points = sweep_budgets(
        trace, striped(trace, 2), [Policy("pinned"), Policy("lru")], (0.25, 0.5, 1.0), TierTerms(cluster, SHAPE),
        fit=trace,
    )  # fmt: skip
    pinned = [p for p in points if p.policy == "pinned"]
    assert [p.fast_slots for p in pinned] == [1, 2, 4]
    assert np.diff([p.hit_rate for p in pinned]).min() > 0
    assert np.diff([p.seconds for p in pinned]).max() < 0
    assert all(p.belady_hit_rate is not None and p.hit_rate <= p.belady_hit_rate for p in pinned)
    assert all(p.belady_hit_rate is None for p in points if p.policy == "lru")
    asked = count_demand(trace, batch=2).activation_LE.sum() / 3 / 2
    assert pinned[0].times_active == pytest.approx(1 / asked, rel=0.02)
    tight = cluster.replace(memory=Memory(HostTier(1.0), fast_slots=np.full(2, 2), transit=3))
    with pytest.raises(InputError, match=r"gives a rank 3 rows, which must be more than its 3"):
        sweep_budgets(trace, striped(trace, 2), [Policy()], (0.25,), TierTerms(tight, SHAPE), fit=trace)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` draws the tiers of a placement and what a bench measured; `evaluate --budgets` prints the same sweep."""
    trace = make_trace(layers=3, experts=8, top_k=2)
    save_trace(tmp_path / "t.trace", trace)
    save_placement(tmp_path / "p.json", view(0).placement)
    (tmp_path / "c.toml").write_text(
        "ranks_per_node = 2\nslots_per_rank = 4\n[fast]\nslots = 2\ntransit = 1\n[host]\nbandwidth = 1e4\n"
    )
    offload = {
        "conditions": {"active_experts": 1.0, "ranks": 1},
        "runs": [RUN, {**RUN, "budget": 1.0, "fast_slots": 8}],
    }
    (tmp_path / "o.json").write_text(json.dumps(offload))
    words = ["report", str(tmp_path / "t.trace"), "--placement", str(tmp_path / "p.json"), "--out", str(tmp_path / "r")]
    tiers = ["--cluster", str(tmp_path / "c.toml"), "--batch", "2", "--budgets", "50,100"]
    assert main([*words, *tiers, "--offload", str(tmp_path / "o.json")]) == 0
    text = check_page((tmp_path / "r").read_text())
    assert "milliseconds of a step, predicted" in text
    assert "milliseconds of a step, measured" in text
    assert main([*words, "--policy", "lru"]) == 1
    assert "--policy (lru) needs memory tiers" in capsys.readouterr().err
    words = ["evaluate", str(tmp_path / "t.trace"), str(tmp_path / "p.json"), *tiers, "--json", str(tmp_path / "e")]
    assert main(words) == 0
    found = json.loads((tmp_path / "e").read_text())["budgets"]
    assert [(each["budget"], each["policy"]) for each in found] == [
        (b, p) for b in (0.5, 1.0) for p in ("pinned", "lru", "lookahead +85%")
    ]
    assert "times active" in capsys.readouterr().out


RUN = {
    "budget": 0.5, "fast_slots": 4, "policy": "lru", "hit_rate": 0.7, "belady_hit_rate": 0.8,
    "seconds_per_step": 2e-3, "predicted_hit_rate": 0.7, "predicted_seconds": 1.9e-3,
}  # fmt: skip


def wrong_documents() -> Iterator[Any]:
    """Each part missing or of another kind, each figure out of its range, alone and beside a run that is right."""
    conditions = {"active_experts": 1.0, "ranks": 1}
    yield from ([], {}, "x", None, {"runs": [RUN]}, {"conditions": conditions}, {"conditions": {}, "runs": [RUN]})
    yield from ({"conditions": conditions, "runs": runs} for runs in ([], {}, "x", 5, [5], {"a": RUN}))
    for wrong in (0, -1, float("nan"), float("inf"), 10**400, "x", None, []):
        yield from ({"conditions": {**conditions, name: wrong}, "runs": [RUN]} for name in conditions)
        for name in RUN:
            if name != "policy" and not (
                (wrong == 0 and name.endswith("hit_rate")) or (wrong is None and "bel" in name)
            ):
                yield {"conditions": conditions, "runs": [{**RUN, name: wrong}]}
                yield {"conditions": conditions, "runs": [RUN, {**RUN, "budget": 1.0, name: wrong}]}
    for name in RUN:
        yield {"conditions": conditions, "runs": [{key: value for key, value in RUN.items() if key != name}]}


def test_other_files_are_refused() -> None:
    """What is not a bench's file is named, and what a file of an older version lacks."""
    for ranks in (1, 2):  # rows are of one rank, active experts of all
        good = budgets_from_json({"conditions": {"active_experts": 1.0, "ranks": ranks}, "runs": [RUN]}, "o")
        assert good.points[0].times_active == 4 * ranks
    for document in wrong_documents():
        with pytest.raises(FormatError, match="o is not the JSON of `moeplace bench offload`"):
            budgets_from_json(document, "o")
    with pytest.raises(FormatError, match="it lacks 'active_experts'"):
        budgets_from_json({"conditions": {}, "runs": [RUN]}, "o")


def test_curves_need_the_model_and_the_cluster_of_the_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model's placement, another number of ranks, a cluster without tiers: a sentence, and no page."""
    trace = make_trace(layers=3, experts=8, top_k=2)
    save_trace(tmp_path / "t.trace", trace)
    save_placement(tmp_path / "p.json", view(0).placement)
    save_placement(tmp_path / "four.json", striped(trace, 4))
    save_placement(tmp_path / "other.json", striped(make_trace(layers=3, experts=12, top_k=2), 2))
    flat = "ranks_per_node = 2\nslots_per_rank = 6\n"
    (tmp_path / "flat.toml").write_text(flat)
    (tmp_path / "c.toml").write_text(f"{flat}[fast]\nslots = 2\ntransit = 1\n[host]\nbandwidth = 1e4\n")
    for cluster, placements, words in (
        ("flat", ("p",), "the cluster has no memory tiers"),
        ("c", ("four",), "the placement is for 4 ranks on 1 nodes, the cluster has 2 on 1"),
        ("c", ("p", "other"), "the placement is for another model"),
        ("c", ("other",), "the placement is for another model"),
    ):
        given = [word for name in placements for word in ("--placement", str(tmp_path / f"{name}.json"))]
        flags = ["--cluster", str(tmp_path / f"{cluster}.toml"), "--batch", "2", "--out", str(tmp_path / "r")]
        assert main(["report", str(tmp_path / "t.trace"), *given, *flags]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "r").exists()
