"""`moeplace serve`: complete a file of requests on the ranks that torchrun started, or answer over HTTP."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.policy import tier_limits
from moeplace.launch.options.precision import chosen, describe_precision, inexact_sentence, served_plan
from moeplace.launch.options.replanning import add_replan_arguments, check_replan_arguments
from moeplace.launch.serving.front_arguments import (
    add_engine_arguments,
    add_front_arguments,
    check_trace_arguments,
    replica_rule_of,
)
from moeplace.launch.settings import add_config_argument

if TYPE_CHECKING:
    from moeplace.placement.tiers.precision import PrecisionPlan
    from moeplace.runtime.comm.group import RankGroup
    from moeplace.runtime.engine.engine import Engine
    from moeplace.runtime.service.api import Service

HELP = "serve a file of requests (under torchrun for several ranks), or answer OpenAI-compatible HTTP requests"
HAS_SETTINGS = True
EXAMPLE = "moeplace serve MODEL --http 127.0.0.1:8000 --ranks 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("--model", dest="model_setting", help=argparse.SUPPRESS)  # what a file can say
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--requests", metavar="IN", help="JSONL: prompt or token_ids, one request a line")
    source.add_argument(
        "--http", metavar="HOST:PORT", help="answer HTTP requests; port 0 takes a free one and prints it"
    )
    add_config_argument(parser)
    add_engine_arguments(parser)
    file = parser.add_argument_group("with --requests")
    file.add_argument("--out", metavar="OUT", help="JSONL of completions to write")
    file.add_argument("--json", metavar="F", help="write figures and counters of rank 0 to F")
    file.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="where a request does not say")
    front = parser.add_argument_group("with --http")
    front.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks to start on this machine (default: 1)")
    front.add_argument("--log-dir", metavar="DIR", help="keep what each rank prints, in member-ID.log")
    add_front_arguments(front)
    add_replan_arguments(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    args.model = args.model or args.model_setting
    if args.model is None:
        args.usage_error("the following arguments are required: MODEL")
    check_replan_arguments(args)
    check_trace_arguments(args)
    if args.http is not None:
        return _answer_http(args)
    if args.out is None:
        args.usage_error("--requests needs --out")
    return _serve_file(args)


def _serve_file(args: argparse.Namespace) -> int:
    from moeplace.launch.serving.requests_file import Tokenizer, read_requests, serve, write_completions
    from moeplace.profiling.errors import InputError, MoeplaceError
    from moeplace.profiling.files import write_json
    from moeplace.runtime.comm.group import RankGroup

    if args.replan:
        raise InputError("--replan works with --http, where a service goes on")
    if args.timeout <= 0:
        raise InputError(f"--timeout ({args.timeout}) must be positive")
    group = RankGroup.from_environment(timeout=args.timeout, device=args.device)
    tokenizer = Tokenizer(args.model)
    requests = None
    try:  # rank 0 speaks for the group: the others must hear of its failure, not wait for it
        plan = served_plan(args)
        inputs = _load_inputs(args, plan)  # first: what is wrong with the folder is not the tokenizer's to say
        if group.rank == 0:
            requests = read_requests(
                args.requests, tokenizer.encode, max_new_tokens=args.max_new_tokens, seed=args.seed
            )
        if group.rank == 0 and plan is not None:
            print(inexact_sentence(args, plan), flush=True)
    except MoeplaceError as error:
        group.give_up(str(error))
        raise
    engine = _make_engine(args, group, inputs)
    completions, report = serve(engine, requests)
    if group.rank == 0:
        write_completions(args.out, completions, tokenizer)
        if args.json:
            write_json(args.json, {**report, "precision": describe_precision(plan)})
        print(
            f"{report['requests']} requests, {report['new_tokens']} tokens in {report['seconds']:.2f} s "
            f"({report['tokens_per_second']:.1f} tokens/s) on {report['ranks']} ranks; wrote {args.out}"
        )
    return 0


def _answer_http(args: argparse.Namespace) -> int:
    from moeplace.launch.serving.front import serve_http
    from moeplace.profiling.errors import InputError

    if "RANK" in os.environ:
        raise InputError("--http starts its own ranks; run it without torchrun")
    if args.replan and args.ranks == 1:
        raise InputError("--replan needs several ranks: one has nowhere to move an expert")
    return serve_http(args, lambda: _start_service(args))


def _start_service(args: argparse.Namespace) -> "Service":
    """One rank in this process, or several in processes of their own."""
    from moeplace.launch.serving.front import require_log_folder, set_threads, start_coordinator
    from moeplace.runtime.comm.group import RankGroup
    from moeplace.runtime.service.local import LocalService
    from moeplace.runtime.service.spawner import LocalSpawner

    if args.ranks == 1 and not args.admin and not args.state:
        set_threads(args.threads_per_rank)
        group = RankGroup.from_environment(timeout=args.timeout, device=args.device)
        return LocalService(_make_engine(args, group, _load_inputs(args, served_plan(args))))
    if args.threads_per_rank is None:
        args.threads_per_rank = max(1, len(os.sched_getaffinity(0)) // max(args.ranks, 1))
    return start_coordinator(args, LocalSpawner(require_log_folder(args.log_dir)), host="127.0.0.1")


def _load_inputs(args: argparse.Namespace, plan: "PrecisionPlan | None") -> dict[str, Any]:
    from moeplace.placement.placement_file import load_placement
    from moeplace.runtime.engine.modes import RecordedRouting
    from moeplace.runtime.models.precisions.precision_checkpoint import open_checkpoint

    return {
        "checkpoint": open_checkpoint(args.model, chosen(plan)),
        "placement": load_placement(args.placement) if args.placement else None,
        "recorded": RecordedRouting.load(args.trace, args.calibration) if args.trace else None,
    }


def _make_engine(args: argparse.Namespace, group: "RankGroup", inputs: dict[str, Any]) -> "Engine":
    import torch

    from moeplace.runtime.engine.engine import Engine
    from moeplace.runtime.engine.limits import EngineLimits
    from moeplace.runtime.engine.verification import needs_verification, verify_engine

    limits = EngineLimits(
        max_sequences=args.max_sequences,
        max_length=args.max_length,
        kv_bytes=args.kv_bytes,
        max_prefill_tokens=args.max_prefill_tokens,
        reuses_prefixes=args.prefix_reuse,
        alike=args.alike,
        tiers=tier_limits(args),
    )
    is_verified = args.verify if args.verify is not None else needs_verification(inputs["checkpoint"].model_type)
    if args.precision and is_verified:
        _verify_exactly(args, group)
    engine = Engine(
        mode=args.mode,
        group=group,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        limits=limits,
        node_aware=args.node_aware,
        replica_rule=replica_rule_of(args),
        **inputs,
    )
    if is_verified and not args.precision:
        verify_engine(engine)
    return engine


def _verify_exactly(args: argparse.Namespace, group: "RankGroup") -> None:
    """Before inexact experts are read: exact ones, on rank 0 alone, must give the plain model's logits."""
    from moeplace.launch.serving.front import verify_alone
    from moeplace.profiling.errors import MoeplaceError

    if group.rank == 0:
        try:
            verify_alone(args)
        except MoeplaceError as error:  # the others must hear of it
            group.give_up(str(error))
            raise
