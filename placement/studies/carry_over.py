"""How much of a placement's gain survives when the routing changes: fitted to one trace, judged on another."""

from collections.abc import Callable
from dataclasses import dataclass

from moeplace.placement.modes import Mode
from moeplace.placement.solve import solve
from moeplace.placement.studies.held_out import Gain, HeldOut, ratio
from moeplace.placement.studies.verdict import WORTH_HAVING, Terms
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True)
class CarryOver:
    """Gains on held-out tokens of the new trace, over index order.

    Attributes:
        mode: execution mode.
        old: of the placement fitted to the old trace.
        new: of the one fitted to the train side of the new trace.
        surviving: old / new with its interval; None where there is nothing to gain on the new trace.
        refit: gain of fitting anew over keeping the old placement.
        sentence: what follows.
    """

    mode: Mode
    old: Gain
    new: Gain
    surviving: Gain | None
    refit: Gain
    sentence: str


def carry_over(
    old: RoutingTrace,
    train: RoutingTrace,
    held_out: HeldOut,
    terms: Terms,
    *,
    mode: Mode,
    time_limit: float,
    report: Callable[[float], None] = lambda share: None,
) -> CarryOver:
    """Fit to `old` and to `train`, and judge both on `held_out`, which is of the trace that `train` is of.

    Args:
        old: train side of the old trace.
        train: train side of the new one.
        held_out: tokens of the new trace that judge.
        terms: cluster and cost model.
        mode: execution mode.
        time_limit: seconds of both searches together.
        report: called with the share of the work done (0..1).
    """
    problem = terms.problem(train, mode)
    before = held_out.seconds(problem, terms.index_order(problem))
    after = []
    for number, fitted in enumerate((old, train), start=1):
        placement = solve(terms.problem(fitted, mode), time_limit=time_limit / 2, seed=terms.seed).placement
        after.append(held_out.seconds(problem, placement))
        report(number / 2)
    gains, refit = [held_out.gain(before, seconds) for seconds in after], held_out.gain(after[0], after[1])
    surviving = None
    if gains[1].is_beyond_noise:
        surviving = ratio(before - after[0], before - after[1], sequences=held_out.num_sequences)
    return CarryOver(mode, gains[0], gains[1], surviving, refit, _sentence(gains, surviving, refit))


def _sentence(gains: list[Gain], surviving: Gain | None, refit: Gain) -> str:
    if surviving is None:
        return "On the new trace no placement gains beyond noise, so there is nothing that could survive."
    kept = f"{surviving.share:.0%} ({surviving.span})"
    advice = "solve again" if refit.is_beyond_noise and refit.share >= WORTH_HAVING else "keep the placement"
    return (
        f"A placement fitted to the old trace gains {gains[0].share:.1%} on the new one, one fitted to the new one "
        f"{gains[1].share:.1%}: {kept} of the gain survives. Fitting anew saves {refit.share:.1%} of a step "
        f"({refit.span}): {advice}."
    )
