"""`moeplace serve`: complete a file of requests on the ranks that torchrun started."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.runtime.engine import Engine
    from moeplace.runtime.group import RankGroup

HELP = "serve a file of requests under a placement (run under torchrun for several ranks)"
MODES = ("auto", "dispatch-combine", "coherent", "allgather")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("--placement", metavar="P", help="placement file (default: experts in index order)")
    parser.add_argument(
        "--requests", required=True, metavar="IN", help="JSONL: prompt or token_ids, one request a line"
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="JSONL of completions to write")
    parser.add_argument("--mode", choices=MODES, default="auto", help="execution mode (default: auto)")
    parser.add_argument("--node-aware", action="store_true", help="dispatch-combine sends one copy per node")
    parser.add_argument("--trace", metavar="T", help="recorded routing, from which auto predicts every mode")
    parser.add_argument("--calibration", metavar="C", help="measured links and expert time, for --trace")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="where a request does not say")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, where a request does not say")
    parser.add_argument("--max-sequences", type=int, default=64, metavar="N", help="sequences in flight at once")
    parser.add_argument("--max-length", type=int, metavar="N", help="positions of a sequence, completion included")
    parser.add_argument("--kv-bytes", type=int, metavar="B", help="K/V memory of a rank")
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: the checkpoint's)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for another rank")
    parser.add_argument("--json", metavar="F", help="write figures and counters of rank 0 to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.serve import Tokenizer, read_requests, serve, write_completions
    from moeplace.profiling.errors import InputError, MoeplaceError
    from moeplace.profiling.files import write_json
    from moeplace.runtime.group import RankGroup

    if args.timeout <= 0:
        raise InputError(f"--timeout ({args.timeout}) must be positive")
    group = RankGroup.from_environment(timeout=args.timeout)
    tokenizer = Tokenizer(args.model)
    requests = None
    try:  # rank 0 speaks for the group: the others must hear of its failure, not wait for it
        if group.rank == 0:
            requests = read_requests(
                args.requests, tokenizer.encode, max_new_tokens=args.max_new_tokens, seed=args.seed
            )
        inputs = _load_inputs(args)
    except MoeplaceError as error:
        group.give_up(str(error))
        raise
    engine = _make_engine(args, group, inputs)
    completions, report = serve(engine, requests)
    if group.rank == 0:
        write_completions(args.out, completions, tokenizer)
        if args.json:
            write_json(args.json, report)
        print(
            f"{report['requests']} requests, {report['new_tokens']} tokens in {report['seconds']:.2f} s "
            f"({report['tokens_per_second']:.1f} tokens/s) on {report['ranks']} ranks; wrote {args.out}"
        )
    return 0


def _load_inputs(args: argparse.Namespace) -> dict[str, Any]:
    from moeplace.placement.cost_model import Calibration
    from moeplace.placement.placement_file import load_placement
    from moeplace.profiling.trace_file import load_trace

    return {
        "placement": load_placement(args.placement) if args.placement else None,
        "routing": load_trace(args.trace) if args.trace else None,
        "calibration": Calibration.load(args.calibration) if args.calibration else None,
    }


def _make_engine(args: argparse.Namespace, group: "RankGroup", inputs: dict[str, Any]) -> "Engine":
    import torch

    from moeplace.runtime.engine import Engine, EngineLimits

    limits = EngineLimits(max_sequences=args.max_sequences, max_length=args.max_length, kv_bytes=args.kv_bytes)
    return Engine(
        args.model,
        mode=args.mode,
        group=group,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        limits=limits,
        node_aware=args.node_aware,
        **inputs,
    )
