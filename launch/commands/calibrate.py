"""`moeplace calibrate`: measure links and expert time of the ranks that torchrun started."""

import argparse
from typing import TYPE_CHECKING, Any

from moeplace.launch.commands.benchmarks.replay import add_shape_arguments

if TYPE_CHECKING:
    from moeplace.placement.cost.calibration import Calibration

HELP = "measure links and expert time on this cluster (run under torchrun)"
EXAMPLE = "torchrun --standalone --nproc-per-node 4 -m moeplace.launch.cli calibrate --trace t.trace --out c.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="C", help="calibration file to write")
    parser.add_argument(
        "--trace", metavar="T", help="trace of the model to serve: its sizes, where no flag below gives another one"
    )
    parser.add_argument("--num-experts", type=int, metavar="E", help="experts per layer (64)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of routing and weights")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for another rank")
    add_shape_arguments(parser)
    parser.set_defaults(hidden=None, expert_hidden=None, kv_dim=None)


def run(args: argparse.Namespace) -> int:
    import warnings

    from moeplace.launch.benches.replay import calibrate_here, one_thread
    from moeplace.launch.commands.benchmarks.replay import shape_of
    from moeplace.profiling.errors import InputError, MoeplaceWarning

    one_thread()
    unknown = _choose_sizes(args)
    if not 1 <= args.top_k <= args.num_experts:
        raise InputError(f"--top-k ({args.top_k}) must lie in 1..{args.num_experts}, the number of experts")
    calibration = calibrate_here(
        shape_of(args), num_experts=args.num_experts, top_k=args.top_k, seed=args.seed, timeout=args.timeout
    )
    if calibration is not None:  # rank 0 speaks for the group
        calibration.save(args.out)
        print(_format(calibration))
        if unknown:
            warnings.warn(unknown, MoeplaceWarning, stacklevel=1)
        print(f"measured with {_describe_sizes(calibration.conditions)}")
        if calibration.conditions["not measured"]:
            print(f"not measured on these ranks, defaults kept: {', '.join(calibration.conditions['not measured'])}")
    return 0


def _choose_sizes(args: argparse.Namespace) -> str:
    """Sizes that no flag gave: those of the trace's model, and nominal ones where there is none or it does not say.

    Returns:
        a sentence on what the trace does not say, else "".
    """
    import numpy as np
    import torch

    from moeplace.profiling.traces.file import load_trace
    from moeplace.runtime.measure.replay import ReplayShape

    nominal = ReplayShape()
    trace = load_trace(args.trace) if args.trace else None
    known = {"num_experts": 64, "top_k": 1, "hidden": nominal.hidden, "kv_dim": nominal.kv_dim}
    if trace is not None:
        known |= {"num_experts": trace.num_experts, "top_k": trace.top_k}
        known |= {"hidden": trace.hidden_size or nominal.hidden, "kv_dim": trace.kv_dim or nominal.kv_dim}
    for name, size in known.items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if args.expert_hidden is not None:
        return ""
    args.expert_hidden = nominal.expert_hidden
    if trace is not None and trace.expert_bytes is not None:
        # As many bytes as an expert of the model, whatever type its weights have: bytes are what decoding reads.
        row_bytes = 3 * args.hidden * getattr(torch, args.dtype).itemsize
        args.expert_hidden = max(1, round(float(np.median(trace.expert_bytes)) / row_bytes))
    elif trace is not None:
        return f"{args.trace} does not say how large the experts of its model are: --expert-hidden {args.expert_hidden}"
    return ""


def _describe_sizes(conditions: dict[str, Any]) -> str:
    return (
        "batch {batch}, hidden size {hidden}, {experts} experts of hidden size {expert_hidden}, top-{top_k}, "
        "kv_dim {kv_dim}, {dtype}, on {ranks} ranks: `solve --calibration` is for such steps"
    ).format(**conditions)


def _format(calibration: "Calibration") -> str:
    from moeplace.launch.tables import format_table

    rows: list[tuple[str, float, str]] = []
    for tier, link in (("inside nodes", calibration.intra), ("between nodes", calibration.inter)):
        rows += [
            (f"{tier}: latency", link.latency * 1e3, "ms"),
            (f"{tier}: bandwidth of a rank", link.bandwidth / 1e6, "MB/s"),
            (f"{tier}: bandwidth of a node", link.node_bandwidth / 1e6, "MB/s"),
        ]
    expert = calibration.expert
    rows += [
        ("experts of a layer: fixed", expert.fixed * 1e6, "us"),
        ("experts of a layer: per token", expert.per_token * 1e6, "us"),
        ("experts of a layer: per activated expert", expert.per_activated * 1e6, "us"),
    ]
    rows += [(f"rest of a layer: {mode}", s * 1e6, "us") for mode, s in calibration.mode_seconds_per_layer.items()]
    return format_table(("figure", "value", "unit"), rows)
