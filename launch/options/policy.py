"""--policy and what belongs to it: how fast memory is used where experts do not fit."""

import argparse
from typing import Any

POLICY_NAMES = ("pinned", "lru", "lfu", "score", "lookahead")
"""Names of `placement.tiers.policy`, which a parser need not import."""


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """--policy, --accuracy, --look-ahead."""
    group = parser.add_argument_group("memory tiers", "where the cluster file has the tables [fast] and [host]")
    group.add_argument(
        "--policy", choices=POLICY_NAMES, default="pinned",
        help="pinned: what is resident stays; lru, lfu, score: caches; lookahead: pinned, and predicted experts are "
        "fetched early (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--accuracy", type=float, metavar="A", help="share of the next layer's experts that a predictor names, "
        "with any policy (`moeplace profile` measures it; lookahead: 0.85 where nothing is said)",
    )  # fmt: skip
    group.add_argument(
        "--look-ahead", type=int, default=1, metavar="N", help="layers that it looks ahead (default: %(default)s)"
    )


def policy_of(args: argparse.Namespace) -> Any:
    """The `Policy` that the flags name."""
    from moeplace.placement.tiers.policy import FATE_ACCURACY, Policy, Predictor

    accuracy = args.accuracy
    if accuracy is None and args.policy == "lookahead":
        accuracy = FATE_ACCURACY
    return Policy(args.policy, None if accuracy is None else Predictor(accuracy, args.look_ahead))
