"""The comparison of runs: which figures it has, as data, as a text table and as a verdict.

A run is a placement in an execution mode. Its figures have names as in the JSON of `moeplace bench replay`; the
prediction of figure `x` is the figure `predicted_x`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeplace.profiling.errors import FormatError

AS_FAST = 0.95
"""Runs that reach this share of the greatest speed count as fast: on shared machines less is noise."""

_SAVINGS = (
    ("collectives_per_layer", "collectives"),
    ("copies_per_token", "token copies across ranks"),
    ("bytes_inter_node", "bytes between nodes"),
)


@dataclass(frozen=True)
class Figure:
    """A row of the comparison.

    Attributes:
        key: name of the figure of a run; `predicted_` + key is its prediction.
        label: what a person reads.
        digits: after the point.
        scale: multiplies the value before it is shown.
        lower_is_better: which way is good.
        charted: whether it is worth a bar chart.
        tile: whether it stands in large on top of the page.
    """

    key: str
    label: str
    digits: int
    scale: float = 1.0
    lower_is_better: bool = True
    charted: bool = False
    tile: bool = False

    def text(self, value: float | None) -> str:
        """The value as it is shown; "-" where it is unknown."""
        return "-" if value is None else f"{value * self.scale:,.{self.digits}f}"


FIGURES = (
    Figure("collectives_per_layer", "collectives per MoE layer", 2, tile=True),
    Figure("copies_per_token", "token copies across ranks, per token", 2, charted=True, tile=True),
    Figure("bytes_per_token", "KiB across ranks, per token", 2, scale=1 / 1024, tile=True),
    Figure("bytes_inter_node", "MiB between nodes, per step", 3, scale=1 / 2**20, charted=True, tile=True),
    Figure("bytes_intra_node", "MiB inside nodes, per step", 3, scale=1 / 2**20),
    Figure("imbalance", "imbalance (busiest rank / mean)", 2, charted=True, tile=True),
    Figure("seconds_per_step", "milliseconds per decode step", 1, scale=1e3),
    Figure("tokens_per_second", "tokens per second", 0, lower_is_better=False, charted=True, tile=True),
)


_BY_TIER = ("bytes_inter_node", "bytes_intra_node")


@dataclass(frozen=True)
class Run:
    """One column of the comparison.

    Attributes:
        placement: name of the placement.
        mode: execution mode.
        figures: measured and predicted figures; what is unknown is absent.
    """

    placement: str
    mode: str
    figures: Mapping[str, float]

    def measured(self, figure: Figure) -> float | None:
        """The measured value of a figure, or None."""
        return self.figures.get(figure.key)

    def predicted(self, figure: Figure) -> float | None:
        """The predicted value of a figure, or None."""
        return self.figures.get(f"predicted_{figure.key}")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"placement": self.placement, "mode": self.mode, **self.figures}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Run":
        """From plain data; everything that is a number is a figure."""
        figures = {k: float(v) for k, v in document.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if "predicted_seconds" in figures:  # the name that `moeplace bench` gives it
            figures.setdefault("predicted_seconds_per_step", figures["predicted_seconds"])
        return cls(str(document["placement"]), str(document["mode"]), figures)


def runs_from_json(document: Any, source: str) -> list[Run]:
    """The runs of a report or of a benchmark.

    Raises:
        FormatError: it has none.
    """
    try:
        runs = [Run.from_json(run) for run in document["runs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{source} is not a file of measurements: it lacks {error}") from error
    if not runs:
        raise FormatError(f"{source} has no runs")
    return runs


def shown_figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that any run has, measured or predicted; bytes by tier only where some cross nodes."""
    tiers = any(run.figures.get("bytes_inter_node") for run in runs)
    known = [f for f in FIGURES if any(run.measured(f) is not None or run.predicted(f) is not None for run in runs)]
    return [f for f in known if tiers or f.key not in _BY_TIER]


def text_table(runs: Sequence[Run]) -> str:
    """One column per run; what was measured, and below it what was predicted."""
    rows = [["", *(run.placement for run in runs)], ["", *(run.mode for run in runs)], []]
    for figure in shown_figures(runs):
        rows.append([figure.label, *(figure.text(run.measured(figure)) for run in runs)])
        if any(run.predicted(figure) is not None for run in runs):
            rows.append(["  predicted", *(figure.text(run.predicted(figure)) for run in runs)])
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(runs) + 1)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(row or rule, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def best_run(runs: Sequence[Run]) -> Run:
    """The run to recommend: of those that are as fast as any, the one with the fewest copies, then least imbalance."""
    fastest = max(run.figures.get("tokens_per_second", 0.0) for run in runs)
    fast = [run for run in runs if run.figures.get("tokens_per_second", 0.0) >= AS_FAST * fastest]
    unknown = float("inf")
    least = ("copies_per_token", "bytes_inter_node", "bytes_per_token", "imbalance", "seconds_per_step")
    return min(fast, key=lambda run: tuple(run.figures.get(name, unknown) for name in least))


def gains(runs: Sequence[Run]) -> str:
    """How much of the best run's speed comes from its mode and how much from its placement, where runs tell both."""
    first, best = runs[0], best_run(runs)
    between = [run for run in runs if (run.placement, run.mode) == (first.placement, best.mode)]
    speeds = [run.figures.get("tokens_per_second", 0.0) for run in (first, *between[:1], best)]
    if len(speeds) < 3 or not all(speeds) or best.mode == first.mode or best.placement == first.placement:
        return ""
    return (
        f"Of the gain in speed, the mode makes {speeds[1] / speeds[0]:.2f} times, "
        f"the placement {speeds[2] / speeds[1]:.2f} times."
    )


def verdict(runs: Sequence[Run]) -> str:
    """One sentence: which run is best, and by how much against the first one."""
    speeds = [run.figures.get("tokens_per_second", 0.0) for run in runs]
    if not any(speeds):
        return "Nothing was measured."
    baseline, best = runs[0], best_run(runs)
    if best is baseline:
        return f"Leave the experts as they are: no run is better than {baseline.mode} in {baseline.placement} here."
    gain = best.figures["tokens_per_second"] / speeds[0] if speeds[0] else float("inf")
    savings = [words for key, what in _SAVINGS if (words := _saving(baseline, best, key, what))]
    return (
        f"Run {best.mode} with the {best.placement} placement: {', '.join([*savings, ''])}{gain:.2f} times the tokens "
        f"per second of {baseline.mode} in {baseline.placement}."
    )


def _saving(baseline: Run, best: Run, key: str, what: str) -> str:
    """How much less there is of something, if a percent at least."""
    before, after = baseline.figures.get(key), best.figures.get(key)
    if not before or after is None or after > 0.99 * before:
        return ""
    return f"{1 - after / before:.0%} fewer {what}"
