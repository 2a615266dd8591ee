"""The flags with which a serving command watches its routing and re-places experts, and the controller they describe.

add_replan_arguments(parser)
limits = EngineLimits(..., recent_ids=replan_window(args))
controller = build_controller(args, placement, shape=shape)      # None without --replan
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.steps import StepShape
    from moeplace.placement.placement import Placement
    from moeplace.profiling.traces.trace import RoutingTrace
    from moeplace.runtime.replanning.controller import Controller
    from moeplace.runtime.replanning.replanner import ReplaceableService, Replanner

_DEFAULTS: dict[str, Any] = {
    "replan_every": 500,
    "replan_window": 16_384,
    "replan_gain": 0.05,
    "replan_quiet": 500,
    "replan_stall": 0.0,
    "replan_time_limit": 10.0,
    "replan_horizon": None,
    "replan_max_moves": None,
    "replan_log": None,
}


def add_replan_arguments(parser: argparse.ArgumentParser) -> None:
    """--replan and what goes with it; values are None where a flag is not given."""
    group = parser.add_argument_group(
        "re-placement", "look at the routing while serving, and move experts when it pays"
    )

    def add(name: str, kind: type, metavar: str, words: str) -> None:
        default = _DEFAULTS[name.replace("-", "_")]
        words += "" if default is None else f" (default: {default:g})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=words)

    group.add_argument("--replan", action="store_true", help="do so")
    add("replan-every", int, "STEPS", "from one look to the next")
    add("replan-window", int, "TOKENS", "recent tokens to look at")
    add("replan-gain", float, "X", "least share of a step's predicted time that must be to gain")
    add("replan-quiet", int, "STEPS", "steps after a change in which nothing is decided")
    add("replan-stall", float, "S", "seconds that a change costs the service beside its transfers")
    add("replan-time-limit", float, "S", "seconds of a search, which runs in its own process")
    add("replan-horizon", int, "STEPS", "steps for which routing stays as it is (default: unknown; move when staying "
        "has cost as much as moving)")  # fmt: skip
    add("replan-max-moves", int, "M", "most experts fetched per layer in one change")
    add("replan-log", str, "F", "append every decision with its figures to F, one JSON object a line")


def check_replan_arguments(args: argparse.Namespace) -> None:
    """Check, before a service starts, that no flag would be ignored.

    Raises:
        InputError: a flag is given without --replan.
    """
    from moeplace.profiling.errors import InputError

    given = next((name for name in _DEFAULTS if getattr(args, name) is not None), None)
    if given is not None and not args.replan:
        raise InputError(f"--{given.replace('_', '-')} ({getattr(args, given)}) needs --replan")


def replan_window(args: argparse.Namespace) -> int:
    """Recent tokens that engines must keep: `EngineLimits.recent_ids`; 0 without --replan."""
    return int(_value(args, "replan_window")) if args.replan else 0


@contextmanager
def replanning(
    args: argparse.Namespace,
    service: "ReplaceableService",
    *,
    shape: "StepShape",
    is_allowed: Callable[[], bool] = lambda: True,
    **options: Any,
) -> Iterator["Replanner | None"]:
    """The service re-places its experts by itself while the block runs; without --replan nothing happens.

    Args:
        service: has started; a `Coordinator`, for one.
        shape: sizes of its steps.
        is_allowed: asked before anything is looked at or changed.
        **options: `calibration`, `reference` and `seed` of `build_controller`.

    Raises:
        InputError: as `build_controller`.
    """
    from moeplace.runtime.replanning.replanner import Replanner

    controller = build_controller(args, service.placement, shape=shape, step=service.status().steps, **options)
    if controller is None:
        yield None
        return
    replanner = Replanner(controller, service, calibration=options.get("calibration"), is_allowed=is_allowed)
    with replanner.in_background():
        yield replanner


def build_controller(
    args: argparse.Namespace,
    placement: "Placement",
    *,
    shape: "StepShape",
    calibration: "Calibration | None" = None,
    reference: "RoutingTrace | None" = None,
    seed: int = 0,
    step: int = 0,
) -> "Controller | None":
    """The controller that the flags describe, or None without --replan.

    Args:
        placement: in force.
        shape: sizes of the service's steps.
        calibration: measured links and expert time; None = nominal ones.
        reference: routing that the placement was planned on; None = unknown, then the first look challenges it.
        seed: of drift tests and searches.
        step: of the service now.

    Raises:
        InputError: a value is out of range, a flag is given without --replan, or the log cannot be written.
    """
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.evaluation import cluster_of, evaluate
    from moeplace.placement.replacement.review import DRIFT_TOKENS, ReviewSettings
    from moeplace.placement.replacement.rule import ReplacementRule
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.traces.sampling import sample_trace
    from moeplace.runtime.replanning.controller import Controller, ControllerSettings
    from moeplace.runtime.replanning.event_log import EventLog
    from moeplace.runtime.replanning.review_process import ReviewProcess

    check_replan_arguments(args)
    if not args.replan:
        return None
    cluster = cluster_of(placement)
    calibration = calibration or Calibration(cluster.intra, cluster.inter)
    cluster = calibration.apply(cluster)
    window, every = int(_value(args, "replan_window")), int(_value(args, "replan_every"))
    if window < 1:
        raise InputError(f"--replan-window ({window}) must be at least 1")
    settings = ControllerSettings(
        every_steps=every,
        least_tokens=max(window // 8, 1),
        review=ReviewSettings(
            rule=ReplacementRule(*(_value(args, f"replan_{name}") for name in ("gain", "quiet", "stall"))),
            shape=shape,
            calibration=calibration,
            time_limit=_value(args, "replan_time_limit"),
            seed=seed,
            steps_left=_value(args, "replan_horizon"),
            max_moves=_value(args, "replan_max_moves"),
        ),
    )
    promised = None
    if reference is not None:
        reference = sample_trace(reference, most_tokens=DRIFT_TOKENS)  # every review takes it along
        judged = evaluate(reference, placement, cluster=cluster, shape=shape, calibration=calibration)
        promised = judged.predicted_seconds
    return Controller(
        placement,
        cluster,
        runner=ReviewProcess(),
        log=EventLog(_value(args, "replan_log")),
        settings=settings,
        reference=reference,
        promised_seconds=promised,
        step=step,
    )


def _value(args: argparse.Namespace, name: str) -> Any:
    given = getattr(args, name)
    return _DEFAULTS[name] if given is None else given
