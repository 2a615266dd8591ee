"""`moeplace profile`: run a Hugging Face MoE checkpoint over text and record its routing."""

import argparse
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
    print(f"{args.out}: {tokens} tokens of {len(args.text)} text{'s' if len(args.text) > 1 else ''}")
    if args.gate_accuracy:
        print(f"{args.gate_accuracy}: cross-layer gate accuracy")
    return 0
