"""The checkpoint that a benchmark serves, and prompts for it from texts: by default those that ship with moeplace."""

import argparse
from pathlib import Path

Prompts = tuple[tuple[int, ...], ...]


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and --text."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder (default: the one that ships with moeplace)"
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="texts for prompts (default: those that ship)")


def prompts_of(args: argparse.Namespace, *, length: int, count: int) -> tuple[Path, Prompts]:
    """The checkpoint of the arguments, and prompts from all their texts in turn.

    Args:
        args: of `add_prompt_arguments`.
        length: tokens of a prompt.
        count: prompts.

    Raises:
        InputError: the texts do not hold so many, or there is no such checkpoint.
        FormatError: it is damaged.
    """
    from functools import partial
    from itertools import chain, islice

    from moeplace.launch.quickstart.run import shipped, shipped_texts
    from moeplace.launch.serving.requests_file import Tokenizer
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.recording.checkpoint_files import check_checkpoint
    from moeplace.profiling.recording.corpus import token_sequences

    model = check_checkpoint(args.model or shipped("tiny-moe"))
    encode = partial(Tokenizer(model).encode, special=False)
    streams = [token_sequences(path, encode, length=length) for path in args.text or shipped_texts()]
    found = tuple(tuple(ids) for ids in islice(chain.from_iterable(zip(*streams, strict=False)), count))
    if len(found) < count:
        raise InputError(f"the texts hold {len(found)} prompts of {length} tokens, {count} are needed")
    return model, found
