"""--precision and --exact: whether experts are served as the checkpoint has them, or in fewer bits by a plan."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.placement.tiers.precision import PrecisionPlan

EXACT = "exact"


def add_precision_arguments(parser: "argparse._ActionsContainer") -> None:
    """The two flags, one or none of which is given."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--precision", metavar="F", help="keep experts in the bits that a plan of `moeplace bench precision --out` "
        "gives them: fewer bytes, and other results than the checkpoint's (default: exact)",
    )  # fmt: skip
    either.add_argument(
        "--exact", action="store_true", help="serve the checkpoint's own numbers, as is done without --precision"
    )


def served_plan(args: argparse.Namespace) -> "PrecisionPlan | None":
    """The plan of --precision; None = exact.

    Raises:
        InputError: there is no such file.
        FormatError: it is no plan.
    """
    from moeplace.placement.tiers.precision import load_precision

    return load_precision(args.precision) if args.precision else None


def chosen(plan: "PrecisionPlan | None") -> dict[str, Any] | None:
    """What ranks are told of a plan, as plain data; see `precision_checkpoint.open_checkpoint`."""
    if plan is None:
        return None
    names, choice_LE = plan.chosen
    return {"names": list(names), "choice": choice_LE.tolist()}


def describe_precision(plan: "PrecisionPlan | None") -> Any:
    """For status documents and result files: "exact", or what is not."""
    return EXACT if plan is None else plan.summary()


def inexact_sentence(args: argparse.Namespace, plan: "PrecisionPlan") -> str:
    """What a start under a plan says."""
    counts = plan.counts()
    fewer = {name: number for name, number in counts.items() if name != EXACT and number}
    inexact = ", ".join(f"{number} in {name}" for name, number in fewer.items())
    return (
        f"inexact by {args.precision}: {sum(fewer.values())} of {sum(counts.values())} experts in fewer bits"
        f"{f' ({inexact})' if inexact else ''}, predicted error {plan.error:.1e} of the layers' outputs squared"
    )
