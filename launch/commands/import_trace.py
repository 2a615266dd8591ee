"""`moeplace import`: other programs' traces, loads and placements."""

import argparse
import sys
from typing import TYPE_CHECKING

from moeplace.launch.options.layers import expert_counts, layer_range

if TYPE_CHECKING:
    from moeplace.profiling.imports.canonical import Imported

HELP = "read other programs' routing traces, expert loads and placement files"
EXAMPLE = "moeplace import routed.jsonl --from sglang --out t.trace"
SOURCES = {
    "npz": "trace interchange: experts (T, L, K), weights, sequence_ids, positions",
    "sglang": "SGLang recorder dumps (.pt file or folder), or its answers with routed_experts, one a line",
    "vllm": "vLLM's answers with routed_experts, or eplb_load_stats, one a line",
    "trtllm": "TensorRT-LLM expert statistics (folder)",
    "exflow": "ExFlow trace.npy (tokens, layers), top-1",
    "load": "counts by layer and expert: .npy, .npz, .pt, .json, .csv, or a folder with one file a rank",
    "vllm-ascend": "expert map (a placement)",
    "omni": "placement pattern (a placement)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "; ".join(f"{name} = {text}" for name, text in SOURCES.items())
    parser.add_argument(
        "sources", metavar="FILE", nargs="+", help="file or folder to read; several recordings of one model become one"
    )
    parser.add_argument("--from", dest="source_format", required=True, choices=SOURCES, help=listing)
    parser.add_argument("--out", required=True, metavar="T", help="trace, load or placement file to write")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the first K experts of every token; 1 = primary")
    parser.add_argument(
        "--num-experts", type=expert_counts, metavar="E", help="experts per layer, or one number a layer: 64,60,48 or "
        "64x20,48x6 (default: greatest id + 1)",
    )  # fmt: skip
    parser.add_argument("--null-experts", type=int, metavar="N", help="ids E..E+N-1 are null experts (0)")
    parser.add_argument(
        "--layer-ids", type=layer_range, metavar="IDS", help="decoder layers of the MoE layers: 1-26, 3,5,7"
    )
    parser.add_argument(
        "--num-hidden-layers", type=int, default=0, metavar="N", help="decoder layers, dense ones included"
    )
    parser.add_argument(
        "--config", metavar="C", help="config.json of the model, or its folder: says experts, null experts, decoder "
        "layers, hidden size, K/V size, expert bytes and name, where the flags do not",
    )  # fmt: skip
    parser.add_argument("--model", default="", metavar="NAME", help="name of the model")
    parser.add_argument("--expert-bytes", type=int, metavar="B", help="bytes of one expert's weights")
    parser.add_argument("--hidden-size", type=int, default=0, metavar="D", help="hidden size of the model")
    parser.add_argument("--kv-dim", type=int, default=0, metavar="N", help="K/V elements per token and layer")
    parser.add_argument("--shared-experts", type=int, default=0, metavar="N", help="shared experts of a layer")
    parser.add_argument("--fill-value", type=int, metavar="V", help="an id that stands for no expert")
    parser.add_argument("--drop-padding", action="store_true", help="leave out what looks like padded tokens")
    parser.add_argument("--strict", action="store_true", help="refuse data that looks wrong instead of mending it")
    parser.add_argument("--workload-names", default="", metavar="A,B", help="names of the workload tags")
    parser.add_argument("--ranks", type=int, metavar="R", help="of a placement file: ranks, where FILE does not say it")
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="of a placement file: ranks of a node (all in one)"
    )
    parser.add_argument(
        "--ignore-sidecar", action="store_true", help="of a placement file: read FILE as if it stood alone"
    )
    parser.add_argument(
        "--separate-adapters",
        action="store_true",
        help="number the experts that each adapter's tokens used as experts of their own, after those of the base",
    )


def run(args: argparse.Namespace) -> int:
    from moeplace.placement.engines import ENGINES, is_placement_file
    from moeplace.profiling.errors import InputError

    args.source = args.sources[0]
    if args.source_format in ENGINES and is_placement_file(args.source, args.source_format):
        if len(args.sources) > 1:
            raise InputError(f"{args.source} is a placement file: give one, not {len(args.sources)}")
        from moeplace.launch.commands.import_placement import run_import_placement

        args.engine, args.num_hidden_layers = args.source_format, args.num_hidden_layers or None
        return run_import_placement(args)
    return _import_trace(args)


def _import_trace(args: argparse.Namespace) -> int:
    from moeplace.placement.engines import ONLY_PLACEMENTS
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_file
    from moeplace.profiling.imports.canonical import ImportOptions
    from moeplace.profiling.imports.several import import_several
    from moeplace.profiling.model_facts import ModelFacts, read_model_facts

    if args.source_format in ONLY_PLACEMENTS:
        require_file(args.source)
    for name in ("ranks", "ranks_per_node"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for placement files, {args.source} is none")
    facts = read_model_facts(args.config) if args.config else ModelFacts()
    options = ImportOptions(
        top_k=args.top_k,
        num_experts=args.num_experts or facts.num_experts or None,
        null_experts=facts.null_experts if args.null_experts is None else args.null_experts,
        layer_ids=args.layer_ids,
        num_hidden_layers=args.num_hidden_layers or facts.num_hidden_layers,
        model=args.model or facts.model,
        expert_bytes=args.expert_bytes or facts.expert_bytes or None,
        hidden_size=args.hidden_size or facts.hidden_size,
        kv_dim=args.kv_dim or facts.kv_dim,
        shared_experts=args.shared_experts or facts.shared_experts,
        fill_value=args.fill_value,
        drop_padding=args.drop_padding,
        strict=args.strict,
        workload_names=tuple(name.strip() for name in args.workload_names.split(",")) if args.workload_names else (),
        progress=sys.stderr.isatty() and getattr(args, "elsewhere", None) is None,
    )
    elsewhere = getattr(args, "elsewhere", None)
    imported = import_several(args.source_format, args.sources, args.out, options, elsewhere=elsewhere)
    print(imported.summary())
    if args.separate_adapters:
        print(_separate_adapters(imported))
    return 0


def _separate_adapters(imported: "Imported") -> str:
    """Rewrite a trace that was just imported; says what changed."""
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.traces.adapters import separate_adapters
    from moeplace.profiling.traces.file import load_trace, save_trace

    if imported.kind != "trace":
        raise InputError(f"--separate-adapters needs tokens, and {imported.path} holds loads")
    trace, _ = separate_adapters(load_trace(imported.path))
    save_trace(imported.path, trace)
    return f"{trace.notes[-1]}: {trace.experts_per_layer.min()} to {trace.num_experts} experts per layer"
