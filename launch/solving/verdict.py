"""What `moeplace stats` says once a cluster is named: verdict, tokens needed, what survives of a placement's gain."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.calibration import calibration_for
from moeplace.launch.options.problem import (
    add_cluster_arguments,
    add_kv_argument,
    add_replica_rule,
    build_cluster,
    split_sides,
    step_shape,
)
from moeplace.launch.tables import Cell, format_table

if TYPE_CHECKING:
    from moeplace.placement.studies.carry_over import CarryOver
    from moeplace.placement.studies.held_out import Gain
    from moeplace.placement.studies.learning_curve import LearningCurve
    from moeplace.placement.studies.verdict import Option, Terms, Verdict
    from moeplace.profiling.traces.trace import RoutingTrace

_SHARES = {"verdict": 0.5, "curve": 0.3, "carry_over": 0.2}
"""Of the time limit; what is not asked for leaves its share unused."""
MOST_FITTED = 1 << 17
"""Tokens to fit to; longer traces are sampled by whole sequences."""


def add_verdict_arguments(parser: argparse.ArgumentParser) -> None:
    """The cluster, and how much work to put into the verdict."""
    add_cluster_arguments(parser)
    group = parser.add_argument_group("verdict", "what placement would gain on that cluster; with --ranks or the like")
    group.add_argument("--batch", type=int, default=256, help="tokens of one step over all ranks (default %(default)s)")
    add_kv_argument(group)
    group.add_argument(
        "--time-limit", type=float, default=60.0, metavar="S",
        help="seconds of all searches together; replays come on top (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--tolerance", type=float, default=5.0, metavar="P",
        help="per cent of the full gain that may be missing where tokens are called enough (default: %(default)g)",
    )  # fmt: skip
    add_replica_rule(group)
    group.add_argument("--no-curve", action="store_true", help="leave out how many tokens are enough")


def names_cluster(args: argparse.Namespace) -> bool:
    """Whether a verdict is asked for."""
    return bool(args.ranks is not None or args.cluster or args.topology)


def judge_trace(
    args: argparse.Namespace, trace: "RoutingTrace", other: "RoutingTrace | None", report: Callable[[float], None]
) -> dict[str, Any]:
    """`verdict`, `curve` and, with a second trace, `carry_over` as data.

    Args:
        args: parsed flags of `add_verdict_arguments`, and `seed`.
        trace: to judge.
        other: a later one, or None.
        report: called with the share of the work done (0..1).

    Raises:
        InputError: a value is out of range, or the cluster does not hold the experts.
    """
    from moeplace.placement.studies.carry_over import carry_over
    from moeplace.placement.studies.held_out import HeldOut
    from moeplace.placement.studies.learning_curve import learning_curve
    from moeplace.placement.studies.verdict import judge
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.traces.sampling import sample_trace

    if not 0 < args.tolerance < 100:
        raise InputError(f"--tolerance ({args.tolerance:g}) must lie between 0 and 100 per cent")
    if not args.time_limit > 0:
        raise InputError(f"--time-limit ({args.time_limit:g} s) must be positive")
    wanted = ["verdict"] + ["curve"] * (not args.no_curve) + ["carry_over"] * (other is not None)
    shares = _Shares(wanted, args.time_limit, report)
    terms = _terms(args, trace)
    sides = split_sides(trace, "train")
    train, held_out = sample_trace(sides.train, most_tokens=MOST_FITTED), HeldOut(sides.test, seed=args.seed)
    verdict = judge(train, held_out, terms, **shares.part("verdict"))
    document = {"verdict": _verdict(verdict, train, held_out, sides.name, args, terms)}
    mode = verdict.chosen.mode
    if "curve" in wanted:
        tolerance = args.tolerance / 100
        curve = learning_curve(train, held_out, terms, mode=mode, tolerance=tolerance, **shares.part("curve"))
        document["curve"] = _curve(curve, mode)
    if other is not None:
        new = split_sides(other, "train")
        judges = HeldOut(new.test, seed=args.seed)
        new_train = sample_trace(new.train, most_tokens=MOST_FITTED)
        carried = carry_over(train, new_train, judges, terms, mode=mode, **shares.part("carry_over"))
        document["carry_over"] = _carry_over(carried)
    return document


class _Shares:
    """How long each part may search, and how its progress adds up."""

    def __init__(self, wanted: Sequence[str], time_limit: float, report: Callable[[float], None]) -> None:
        self._wanted, self._time_limit, self._report = wanted, time_limit, report

    def part(self, name: str) -> dict[str, Any]:
        """`time_limit` and `report` of a part."""
        before = self._wanted[: self._wanted.index(name)]
        start, whole = (sum(_SHARES[each] for each in names) for names in (before, self._wanted))
        return {
            "time_limit": self._time_limit * _SHARES[name],
            "report": lambda share: self._report((start + share * _SHARES[name]) / whole),
        }


def _terms(args: argparse.Namespace, trace: "RoutingTrace") -> "Terms":
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.replica_rule import get_rule
    from moeplace.placement.studies.verdict import Terms

    cluster = build_cluster(args, trace.num_experts)
    shape = step_shape(args, trace)
    calibration = calibration_for(args, trace, shape, cluster.num_ranks) or Calibration(cluster.intra, cluster.inter)
    return Terms(cluster, shape, calibration, args.seed, get_rule(args.replica_rule))


def describe_judgement(document: dict[str, Any]) -> Iterator[str]:
    """The parts for people, in order."""
    if document.get("verdict"):
        yield _describe_verdict(document["verdict"])
    if document.get("curve"):
        yield _describe_curve(document["curve"])
    if document.get("carry_over"):
        carried = document["carry_over"]
        rows = [
            [f"fitted to the {name} trace", carried[name]["share"] * 100, _range(carried[name])]
            for name in ("old", "new")
        ]
        yield f"{format_table(['on the new trace', 'gain, %', '95 % interval'], rows)}\n{carried['sentence']}"


def _describe_verdict(verdict: dict[str, Any]) -> str:
    rows: list[list[Cell]] = []
    for option in verdict["options"]:
        extra = option["over_plain"]
        rows.append([
            option["mode"], f"{option['slots_per_rank']}{'+' if option['has_replicas'] else ''}",
            option["index_order_seconds"] * 1e3, option["seconds"] * 1e3, option["gain"]["share"] * 100,
            _range(option["gain"]), "-" if extra is None else f"{extra['share'] * 100:.2f} ({_range(extra)})",
            option["ranks_per_token"], option["imbalance"],
        ])  # fmt: skip
    header = ["mode", "slots", "index order, ms", "solved, ms", "gain, %", "95 % interval", "of it by replicas, %",
              "ranks/token", "imbalance"]  # fmt: skip
    terms = verdict["conditions"]
    note = (
        f"({terms['ranks']} ranks, {terms['batch']} tokens a step, {terms['links']}; judged on {terms['tokens']} "
        f"tokens in {terms['sequences']} sequences ({terms['split']}), fitted to {terms['fitted_tokens']}; "
        "slots with + hold replicas)"
    )
    cut = sum(option["status"] == "time_limit" for option in verdict["options"])
    if cut:
        note += f"\nnote: the clock cut {cut} of {len(rows)} searches short; a longer --time-limit may find more"
    return f"{verdict['sentence']}\n\n{format_table(header, rows)}\n{note}"


def _describe_curve(curve: dict[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [point["tokens"], point["sequences"], point["gain"]["share"] * 100, _range(point["gain"]), point["traffic"]]
        for point in curve["points"]
    ]
    unit = "copies/token" if curve["mode"] == "coherent" else "ranks/token"
    table = format_table(["tokens fitted to", "sequences", "gain, %", "95 % interval", unit], rows)
    return f"{table}\n{curve['sentence']}"


def _range(gain: dict[str, float | None]) -> str:
    low, high = gain["low"], gain["high"]
    return "not known" if low is None or high is None else f"{low * 100:.2f}..{high * 100:.2f}"


def _verdict(
    verdict: "Verdict", train: "RoutingTrace", held_out: Any, split: str, args: argparse.Namespace, terms: Any
) -> dict[str, Any]:
    return {
        "sentence": verdict.sentence,
        "is_worth_it": verdict.is_worth_it,
        "mode": verdict.chosen.mode,
        "slots_per_rank": verdict.chosen.slots_per_rank,
        "baseline": verdict.baseline,
        "gain": _gain(verdict.chosen.over_baseline),
        "options": [_option(option) for option in verdict.options],
        "conditions": {
            "ranks": terms.cluster.num_ranks,
            "nodes": terms.cluster.num_nodes,
            "batch": args.batch,
            "fitted_tokens": train.num_tokens,
            "tokens": held_out.trace.num_tokens,
            "sequences": held_out.num_sequences,
            "split": split,
            "links": f"measured times of {args.calibration}" if args.calibration else "nominal links and expert times",
            "time_limit": args.time_limit,
            "seed": args.seed,
        },
    }


def _option(option: "Option") -> dict[str, Any]:
    plain = ("mode", "slots_per_rank", "has_replicas", "index_order_seconds", "fitted_seconds", "seconds",
             "ranks_per_token", "imbalance", "move_seconds", "payback_steps", "extra_bytes", "status")  # fmt: skip
    gains = ("gain", "over_baseline", "over_plain")
    document = {name: getattr(option, name) for name in plain}
    return document | {name: _gain(getattr(option, name)) for name in gains}


def _curve(curve: "LearningCurve", mode: str) -> dict[str, Any]:
    points = [
        {"tokens": p.tokens, "sequences": p.sequences, "gain": _gain(p.gain), "traffic": p.traffic}
        for p in curve.points
    ]
    return {
        "mode": mode,
        "points": points,
        "tolerance": curve.tolerance,
        "enough": curve.enough,
        "sentence": curve.sentence,
    }


def _carry_over(carried: "CarryOver") -> dict[str, Any]:
    gains = ("old", "new", "surviving", "refit")
    document: dict[str, Any] = {name: _gain(getattr(carried, name)) for name in gains}
    return {"mode": carried.mode, **document, "sentence": carried.sentence}


def _gain(gain: "Gain | None") -> dict[str, float | None] | None:
    """As data; an interval that one sequence cannot give is null."""
    if gain is None:
        return None
    known = math.isfinite(gain.low)
    return {"share": gain.share, "low": gain.low if known else None, "high": gain.high if known else None}
