"""The calibration file that a command is given, held against the sizes that it is used for.

What a token, an expert and a layer cost depends on their sizes: a file that was measured with those of another model
predicts that model.
"""

import argparse
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplace.profiling.errors import MoeplaceWarning

if TYPE_CHECKING:
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.steps import StepShape

_WORDS = {
    "ranks": "{:,} ranks",
    "batch": "batch {:,}",
    "hidden": "hidden size {:,}",
    "experts": "{:,} experts",
    "expert_bytes": "{:,} bytes an expert",
    "top_k": "top-{:,}",
    "kv_dim": "kv_dim {:,}",
}


def load_calibration(args: argparse.Namespace) -> "Calibration | None":
    """The file of --calibration; None = not given."""
    from moeplace.placement.cost.calibration import Calibration

    return Calibration.load(args.calibration) if args.calibration else None


def calibration_for(args: argparse.Namespace, known: Any, shape: "StepShape", num_ranks: int) -> "Calibration | None":
    """The file of --calibration, with a warning where it was measured with other sizes than a step has.

    Args:
        args: has `calibration`.
        known: the trace, loads or facts that know the model.
        shape: sizes of the step to predict.
        num_ranks: ranks of the cluster.
    """
    calibration = load_calibration(args)
    if calibration is not None:
        others = calibration.other_sizes(_sizes(known, shape, num_ranks))
        if others:
            warnings.warn(_sentence(args, others, shape.batch), MoeplaceWarning, stacklevel=3)
    return calibration


def _sizes(known: Any, shape: "StepShape", num_ranks: int) -> dict[str, float]:
    """Of the step, by the names of a calibration's conditions; 0 = unknown."""
    bytes_LE = getattr(known, "expert_bytes", None)
    expert_bytes = 0 if bytes_LE is None else int(np.median(np.asarray(bytes_LE)))
    return {
        "ranks": num_ranks,
        "batch": shape.batch,
        "hidden": shape.hidden_size,
        "experts": getattr(known, "num_experts", 0),
        "expert_bytes": expert_bytes,
        "top_k": getattr(known, "top_k", 0),
        "kv_dim": shape.kv_dim,
    }


def _sentence(args: argparse.Namespace, others: dict[str, tuple[float, float]], batch: int) -> str:
    measured = ", ".join(_WORDS[name].format(int(pair[0])) for name, pair in others.items())
    wanted = ", ".join(_WORDS[name].format(int(pair[1])) for name, pair in others.items())
    trace = getattr(args, "trace", None) or "T"
    return (
        f"{args.calibration} was measured with {measured}, but a step here has {wanted}: predicted seconds are those "
        f"of the measured sizes; `moeplace calibrate --trace {trace} --batch {batch}` "
        "on the ranks to plan for measures these"
    )
