"""`moeplace profile`: run a Hugging Face MoE checkpoint over text and record its routing."""

import argparse
import os
import sys

HELP = "run a Hugging Face MoE checkpoint over text and record a routing trace"
EXAMPLE = "moeplace profile MODEL --text a.txt b.txt --out t.trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder (safetensors; nothing is downloaded)")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files; each is one workload tag")
    parser.add_argument("--out", required=True, metavar="T", help="trace file to write")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens per sequence (128)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences per forward pass (16)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens of each file")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument(
        "--gate-accuracy", metavar="F", help="JSON file: how well gate l + 1 does on the input of gate l"
    )


def run(args: argparse.Namespace) -> int:
    from moeplace.profiling.recording.checkpoint_profile import profile_checkpoint

    tokens = profile_checkpoint(
        args.model,
        args.text,
        args.out,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        device=args.device,
        gate_accuracy=args.gate_accuracy,
        progress=sys.stderr.isatty(),
    )
    print(summarise(args.out, tokens=tokens, texts=len(args.text)))
    if args.gate_accuracy:
        print(f"{args.gate_accuracy}: cross-layer gate accuracy")
    return 0


def summarise(path: str, *, tokens: int, texts: int) -> str:
    """What a recorded trace holds, which decoder layers it leaves out and why, and what to do with it."""
    import numpy as np

    from moeplace.profiling.imports.canonical.findings import ranges
    from moeplace.profiling.traces.file import load_trace

    trace = load_trace(path)
    layers, depth = np.asarray(trace.layer_ids), trace.num_hidden_layers
    least, most = int(trace.experts_per_layer.min()), int(trace.experts_per_layer.max())
    experts = f"{most}" if least == most else f"{least} to {most}"
    null = f" and {trace.null_experts} zero-computation ones" if trace.null_experts else ""
    lines = [
        f"{path}: {tokens} tokens of {texts} text{'s' if texts > 1 else ''} x {trace.num_layers} layers x {experts} "
        f"experts{null}, top-{trace.top_k} ({_size(os.path.getsize(path))})",
        f"MoE layers: decoder layers {ranges(np.unique(layers))} of {depth}",
    ]
    skipped = np.setdiff1d(np.arange(depth), layers)
    if len(skipped):
        lines.append(f"not in the trace: decoder layers {ranges(skipped)}, which have no routed experts to place")
    sizes = [f"hidden size {trace.hidden_size}", f"{trace.kv_dim} K/V elements a token and decoder layer"]
    if trace.expert_bytes is not None:
        sizes.append(f"{_size(int(trace.expert_bytes.max()))} an expert")
    lines.append(f"model {trace.model}: {', '.join(sizes)}")
    ranks = next((ranks for ranks in (8, 4, 2) if ranks <= least), 1)
    lines.append(f"next: moeplace stats {path} --ranks {ranks} (is a placement worth having), or")
    lines.append(f"      moeplace solve {path} --ranks {ranks} --out p.json")
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
