"""`moeplace watch`: beside a running engine, say when another placement pays, and write it."""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.launch.watching.sources import RoutingSource
    from moeplace.placement.placement import Placement

HELP = "watch the routing of a running SGLang or vLLM server, and write the next placement when it pays"
EXAMPLE = "moeplace watch http://127.0.0.1:30000 --engine sglang --placement p.json --prompts in.jsonl --out next.json"
_ENGINES = ("sglang", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="address of the server")
    parser.add_argument("--engine", required=True, choices=_ENGINES, help="what runs there")
    parser.add_argument("--placement", required=True, metavar="P", help="placement in force; read before every look")
    parser.add_argument("--out", required=True, metavar="P2", help="placement to write when another one pays; the "
                        "engine's own file is written beside it as P2's name with .ENGINE.json")  # fmt: skip
    parser.add_argument("--trace", metavar="T", help="routing that P was planned on: drift is measured against it")
    source = parser.add_argument_group("routing")
    source.add_argument("--prompts", metavar="FILE", help="probe with these prompts (a text a line, or JSON lines with "
                        "`prompt`); the server must run with --enable-return-routed-experts")  # fmt: skip
    source.add_argument("--recordings", metavar="DIR", help="SGLang: let its recorder run instead, and read the dumps "
                        "that the server writes to this folder")  # fmt: skip
    source.add_argument("--seconds", type=float, default=10.0, metavar="S", help="that the recorder runs (%(default)s)")
    source.add_argument("--requests", type=int, default=32, metavar="N", help="probes in a look (%(default)s)")
    source.add_argument("--new-tokens", type=int, default=64, metavar="N", help="generated per probe (%(default)s)")
    source.add_argument("--window", type=int, default=256, metavar="N", help="latest answers kept (%(default)s)")
    source.add_argument("--model", default="", help="name that vLLM's server wants in a request")
    source.add_argument("--api-key-file", metavar="F", help="file with the server's bearer token")
    source.add_argument("--timeout", type=float, default=120.0, metavar="S", help="of a request (%(default)s)")
    rule = parser.add_argument_group("when to move")
    rule.add_argument("--every", type=float, default=600.0, metavar="S", help="from look to look (%(default)s)")
    rule.add_argument("--looks", type=int, default=0, metavar="N", help="how many (0 = until interrupted)")
    rule.add_argument("--steps-per-look", type=int, default=10_000, metavar="N",
                      help="steps of the engine from look to look: losses add up over them (%(default)s)")  # fmt: skip
    rule.add_argument(
        "--gain", type=float, default=0.05, metavar="X", help="least share of a step to win (%(default)s)"
    )
    rule.add_argument("--max-moves", type=int, metavar="M", help="most experts fetched per layer")
    rule.add_argument("--batch", type=int, default=256, help="tokens of one step over all ranks (%(default)s)")
    rule.add_argument("--calibration", metavar="C", help="measured links and expert time (else nominal ones)")
    rule.add_argument("--time-limit", type=float, default=30.0, metavar="S", help="of a search (%(default)s)")
    rule.add_argument("--seed", type=int, default=0)
    rule.add_argument("--hook", metavar="COMMAND", help="run this with the engine's file as its last word; put the new "
                      "placement to where --placement points once the engine uses it")  # fmt: skip
    rule.add_argument("--log", metavar="F", help="append every look with its figures to F, one JSON object a line")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Look, judge, write, until interrupted."""
    import tempfile
    import threading
    from pathlib import Path

    from moeplace.launch.watching.watcher import Watcher, WatchOptions
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.placement_file import load_placement
    from moeplace.profiling.files import require_folder_of
    from moeplace.profiling.traces.file import load_trace
    from moeplace.runtime.replanning.event_log import EventLog

    _check(args)
    require_folder_of(args.out, args.log)
    placement = load_placement(args.placement)
    calibration = Calibration.load(args.calibration) if args.calibration else None
    options = WatchOptions(
        Path(args.placement), Path(args.out), args.engine, args.every, args.looks, args.steps_per_look,
        hook=tuple(shlex.split(args.hook or "")), calibrated=None if calibration is None else calibration.apply,
    )  # fmt: skip
    reference = load_trace(args.trace) if args.trace else None
    with EventLog(args.log) as log, tempfile.TemporaryDirectory(prefix="moeplace-watch-") as folder:
        watcher = Watcher(_source(args, placement), options, _settings(args, calibration), log, reference)
        watcher.run(Path(folder), threading.Event())
    return 0


def _check(args: argparse.Namespace) -> None:
    if bool(args.prompts) == bool(args.recordings):
        args.parser.error("say where routing comes from: --prompts FILE or --recordings DIR, one of them")
    if args.recordings and args.engine != "sglang":
        args.parser.error("--recordings is SGLang's recorder; vLLM is probed with --prompts")
    if args.engine == "vllm" and not args.model:
        args.parser.error("vLLM wants --model in every request")
    for name in ("requests", "new_tokens", "window", "every", "seconds", "timeout", "steps_per_look"):
        if not getattr(args, name) > 0:
            args.parser.error(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be positive")


def _source(args: argparse.Namespace, placement: "Placement") -> "RoutingSource":
    from pathlib import Path

    from moeplace.launch.watching.client import EngineClient
    from moeplace.launch.watching.sources import ProbeSource, RecorderSource, read_prompts
    from moeplace.profiling.files import require_file
    from moeplace.profiling.imports.canonical import ImportOptions

    key = require_file(args.api_key_file).read_text(encoding="utf-8").strip() if args.api_key_file else ""
    client = EngineClient(args.url, timeout=args.timeout, api_key=key)
    experts = tuple(int(count) for count in placement.experts_per_layer)
    options = ImportOptions(
        num_experts=experts[0] if len(set(experts)) == 1 else experts,
        num_hidden_layers=placement.num_hidden_layers,
        layer_ids=None if placement.layer_ids is None else tuple(int(layer) for layer in placement.layer_ids),
    )
    if args.recordings:
        return RecorderSource(client, Path(args.recordings), options=options, seconds=args.seconds)
    return ProbeSource(
        client, args.engine, read_prompts(args.prompts), options=options, model=args.model,
        new_tokens=args.new_tokens, requests=args.requests, window=args.window,
    )  # fmt: skip


def _settings(args: argparse.Namespace, calibration: Any) -> Any:
    from moeplace.placement.cost.calibration import Calibration
    from moeplace.placement.cost.steps import StepShape
    from moeplace.placement.replacement.review import ReviewSettings
    from moeplace.placement.replacement.rule import ReplacementRule

    return ReviewSettings(
        rule=ReplacementRule(least_gain=args.gain, quiet_steps=0),
        shape=StepShape(batch=args.batch),
        calibration=calibration or Calibration(),
        time_limit=args.time_limit,
        seed=args.seed,
        max_moves=args.max_moves,
    )
