"""`moeplace serve`: complete a file of requests on the ranks that torchrun started, or answer over HTTP."""

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from moeplace.launch.replan import add_replan_arguments, check_replan_arguments, replan_window, replanning

if TYPE_CHECKING:
    from moeplace.runtime.engine import Engine
    from moeplace.runtime.group import RankGroup
    from moeplace.runtime.service import Service

HELP = "serve a file of requests (under torchrun for several ranks), or answer OpenAI-compatible HTTP requests"
MODES = ("auto", "dispatch-combine", "coherent", "allgather")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("--placement", metavar="P", help="placement file (default: experts in index order)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--requests", metavar="IN", help="JSONL: prompt or token_ids, one request a line")
    source.add_argument(
        "--http", metavar="HOST:PORT", help="answer HTTP requests; port 0 takes a free one and prints it"
    )
    parser.add_argument("--out", metavar="OUT", help="with --requests: JSONL of completions to write")
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
    parser.add_argument("--json", metavar="F", help="with --requests: write figures and counters of rank 0 to F")
    _add_http_arguments(parser.add_argument_group("with --http"))
    add_replan_arguments(parser)
    parser.set_defaults(usage_error=parser.error)


def _add_http_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks to start on this machine (default: 1)")
    group.add_argument("--model-name", metavar="NAME", help="the model's name for clients (default: its folder's)")
    group.add_argument(
        "--api-key-file", metavar="F", help="bearer token that clients must send (default: $MOEPLACE_API_KEY, or none)"
    )
    group.add_argument("--max-body-bytes", type=int, default=1 << 20, metavar="B", help="of a request")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (default: what fits)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most that may be asked for (default: what fits)")
    group.add_argument(
        "--max-concurrent", type=int, default=256, metavar="N", help="completions at once; beyond: status 429"
    )
    group.add_argument(
        "--stall-timeout", type=float, default=60.0, metavar="S", help="seconds without a byte taken by a client"
    )
    group.add_argument(
        "--drain-timeout", type=float, default=30.0, metavar="S", help="seconds to finish what runs after SIGTERM"
    )


def run(args: argparse.Namespace) -> int:
    check_replan_arguments(args)
    if args.http is not None:
        return _answer_http(args)
    if args.out is None:
        args.usage_error("--requests needs --out")
    return _serve_file(args)


def _serve_file(args: argparse.Namespace) -> int:
    from moeplace.launch.serve import Tokenizer, read_requests, serve, write_completions
    from moeplace.profiling.errors import InputError, MoeplaceError
    from moeplace.profiling.files import write_json
    from moeplace.runtime.group import RankGroup

    if args.replan:
        raise InputError("--replan works with --http, where a service goes on")
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


def _answer_http(args: argparse.Namespace) -> int:
    from pathlib import Path

    from moeplace.launch.serve import Tokenizer
    from moeplace.profiling.errors import InputError
    from moeplace.runtime.checkpoint import Checkpoint

    if args.replan and args.ranks == 1:
        raise InputError("--replan needs several ranks: one has nowhere to move an expert")
    try:
        from moeplace.launch.http_front.application import HttpFront
        from moeplace.launch.http_front.server import address_of, bind, run_front
        from moeplace.launch.http_front.settings import FrontSettings, parse_address, read_api_key
    except ModuleNotFoundError as error:
        raise InputError(f"--http needs {error.name}: pip install 'moeplace[serve]'") from error
    settings = FrontSettings(
        model=args.model_name or Path(args.model).resolve().name,
        api_key=read_api_key(args.api_key_file),
        max_body_bytes=args.max_body_bytes,
        max_prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        max_concurrent=args.max_concurrent,
        stall_timeout=args.stall_timeout,
        drain_timeout=args.drain_timeout,
        seed=args.seed,
    )
    with bind(*parse_address(args.http), settings) as listener:  # first: that the port is taken is known at once
        stop_ids = Checkpoint(args.model).stop_ids
        tokenizer = Tokenizer(args.model)
        if tokenizer.exists:
            tokenizer.load()
        service = _start_service(args)
        try:
            front = HttpFront(service, settings, coder=tokenizer if tokenizer.exists else None, stop_ids=stop_ids)
            with _replanning(args, service):
                run_front(
                    front,
                    listener,
                    drain_timeout=settings.drain_timeout,
                    on_ready=lambda: print(f"serving {settings.model} on {address_of(listener)}", flush=True),
                )
        finally:
            service.close(drain=False, timeout=args.timeout)
    print("stopped")
    return 0


def _start_service(args: argparse.Namespace) -> "Service":
    """A service that takes requests: one rank in this process, or several that it starts."""
    from moeplace.profiling.errors import InputError
    from moeplace.runtime.group import RankGroup
    from moeplace.runtime.local_service import LocalService

    if "RANK" in os.environ:
        raise InputError("--http starts its own ranks; run it without torchrun")
    if args.ranks == 1:
        return LocalService(_make_engine(args, RankGroup.from_environment(timeout=args.timeout), _load_inputs(args)))
    if (args.trace or args.calibration) and not args.replan:
        raise InputError("--trace and --calibration work with one rank, with --replan, or under torchrun")
    return _start_ranks(args)


def _start_ranks(args: argparse.Namespace) -> "Service":
    from moeplace.runtime.coordinator import Coordinator
    from moeplace.runtime.engine import EngineLimits
    from moeplace.runtime.local_spawner import LocalSpawner
    from moeplace.runtime.service import ServiceOptions

    limits = EngineLimits(
        max_sequences=args.max_sequences,
        max_length=args.max_length,
        kv_bytes=args.kv_bytes,
        staging_rows=1,
        recent_ids=replan_window(args),
    )
    options = ServiceOptions(
        mode=args.mode,
        dtype=args.dtype,
        limits=limits,
        node_aware=args.node_aware,
        timeout=args.timeout,
        keep_width=True,
    )
    placement = _load_inputs(args)["placement"]
    service = Coordinator(args.model, ranks=args.ranks, spawner=LocalSpawner(), options=options, placement=placement)
    try:
        service.wait_until_serving(timeout=options.start_timeout)
    except BaseException:
        service.close(drain=False)
        raise
    return service


def _replanning(args: argparse.Namespace, service: "Service") -> AbstractContextManager[object]:
    """The service re-places its experts while this is open, if the flags say so."""
    from moeplace.placement.cost_model import StepShape
    from moeplace.runtime.checkpoint import Checkpoint
    from moeplace.runtime.coordinator import Coordinator

    if not isinstance(service, Coordinator):
        return nullcontext()
    inputs, config = _load_inputs(args), Checkpoint(args.model).config
    shape = StepShape(batch=args.max_sequences, hidden_size=int(config.get("hidden_size", StepShape().hidden_size)))
    calibration, reference = inputs["calibration"], inputs["routing"]
    return replanning(args, service, shape=shape, calibration=calibration, reference=reference, seed=args.seed)


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
