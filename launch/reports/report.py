"""The HTML report: what placements do to a trace, and what was measured under them.

Shape letters: L MoE layers, B = L - 1 layer boundaries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Self

from moeplace.launch.reports import page
from moeplace.launch.reports.comparison import Run, runs_from_json, verdict
from moeplace.launch.reports.front_chart import Front
from moeplace.launch.reports.measured import comparison, tiles
from moeplace.launch.reports.sections import affinities, flows, loads, placements_section, sweeps, timeline
from moeplace.launch.reports.standing import figures_of, objective_figure, sentence, standing_run
from moeplace.launch.reports.tiers import Budgets, TierView, tier_section
from moeplace.launch.reports.views import PlacementView, make_views
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import PlacementFile
from moeplace.profiling.files import atomic_write
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.event import Event


@dataclass(frozen=True, eq=False)
class Report:
    """What a page shows.

    Attributes:
        views: the placements; the first is the one the others are compared with.
        runs: measurements, may be none; the first is the baseline.
        conditions: how all of it came to be.
        check: the outcome of a comparison with the plain model, may be empty.
        equal: whether it went well.
        fronts: traffic against balance, may be none.
        events: of a service, may be none.
        tiers: placements with experts that do not fit, may be none.
        budgets: what more fast memory is worth, may be none.
    """

    views: Sequence[PlacementView]
    runs: Sequence[Run] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""
    equal: bool = True
    fronts: Sequence[Front] = ()
    events: Sequence[Event] = ()
    tiers: Sequence[TierView] = ()
    budgets: Sequence[Budgets] = ()

    @classmethod
    def of(
        cls,
        trace: RoutingTrace,
        placements: Mapping[str, Placement | PlacementFile],
        document: Mapping[str, Any],
        *,
        fronts: Sequence[Front] = (),
        events: Sequence[Event] = (),
        tiers: Sequence[TierView] = (),
        budgets: Sequence[Budgets] = (),
    ) -> Self:
        """A report on placements seen through `trace`.

        Args:
            trace: the tokens to judge by.
            placements: by name, with their files' provenance where it is known; the first is the baseline.
            document: conditions, runs and checks, as in report.json; may lack any.
            fronts: see `fronts_from_json`.
            events: see `read_events`.
            tiers, budgets: see `reports.tiers`.

        Raises:
            InputError: a placement is for another model.
            FormatError: the runs are not runs.
        """
        checks = document.get("checks", {})
        runs = runs_from_json(document, "the measurements") if "runs" in document else []
        return cls(
            views=make_views(trace, placements),
            runs=runs,
            conditions=document.get("conditions", {}),
            check=checks.get("sentence", ""),
            equal=checks.get("equal", True),
            fronts=fronts,
            events=events,
            tiers=tiers,
            budgets=budgets,
        )

    @property
    def replayed(self) -> bool:
        """Whether what was measured is a replay of recorded routing instead of a model that serves."""
        return self.conditions.get("benchmark") == "replay"

    @property
    def before(self) -> PlacementView:
        return self.views[0]

    @property
    def after(self) -> PlacementView:
        """The placement with least of what its mode pays for, the first one excepted."""
        return min(self.views[1:] or self.views, key=lambda v: standing_run(v).figures[objective_figure(v).key])

    @property
    def verdict(self) -> str:
        """One sentence or two."""
        if self.runs:
            return verdict(self.runs)
        if self.after is self.before:
            return f"{self.before.name} on {self.before.placement.num_ranks} ranks: nothing to compare it with."
        return sentence(self.before, self.after)


def write_report(path: str | Path, report: Report) -> None:
    """Write the page, atomically."""
    with atomic_write(path) as file:
        file.write(render(report).encode())


def render(report: Report) -> str:
    """The page as text."""
    views, shown = report.views, [standing_run(view) for view in report.views]
    body = [_header(report)]
    if report.runs:
        body += [tiles(report.runs), comparison(report.runs, replayed=report.replayed)]
    elif report.after is not report.before:
        best = shown[[view.name for view in views].index(report.after.name)]
        body.append(tiles([shown[0], best], figures=figures_of(report.after)))
    body.append(placements_section(views))
    if report.tiers or report.budgets:
        body.append(tier_section(report.tiers, report.budgets))
    if report.fronts:
        body.append(sweeps(report.fronts))
    body += [flows(views), loads(views)] if len(report.before.travel_BRR) else [loads(views)]
    if len(report.before.travel_BRR):
        body.append(affinities([report.before] if report.after is report.before else [report.before, report.after]))
    if report.events:
        body.append(timeline(report.events))
    if report.conditions:
        body.append(page.section("Conditions", "What was run, and how.", [page.definitions(report.conditions)]))
    return page.page("moeplace report", body)


def _header(report: Report) -> str:
    placement = report.before.placement
    nodes = f" on {placement.num_nodes} nodes" if placement.num_nodes > 1 else ""
    kicker = (
        f"moeplace report · {report.conditions.get('model', 'routing trace')} · {placement.num_ranks} ranks{nodes} · "
        f"judged on {int(report.before.stats.num_tokens):,} tokens{' · replay' if report.replayed else ''}"
    )
    check = f'<p class="check{"" if report.equal else " bad"}">{escape(report.check)}</p>' if report.check else ""
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(report.verdict)}</h1>{check}</header>'
