"""Numbers of layers and of experts as people write them on a command line."""

import argparse

_MOST_LAYERS = 1 << 16
_MOST_SLOTS = 1 << 20


def layer_range(text: str) -> tuple[int, ...]:
    """`1-3,7` as (1, 2, 3, 7)."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) >= _MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a layer nor a range of layers such as 1-26")
        layers.extend(range(int(first), int(last or first) + 1))
    return tuple(layers)


def expert_counts(text: str) -> int | tuple[int, ...]:
    """`64` as 64, `64,60,48` as (64, 60, 48), `64x3,48` as (64, 64, 64, 48)."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.strip().partition("x")
        if not count.isdigit() or (times and not times.isdigit()) or int(times or 1) >= _MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number of experts (64), or one for some layers (64x3)")
        counts.extend([int(count)] * int(times or 1))
    return counts[0] if len(counts) == 1 and "x" not in text else tuple(counts)


def slot_counts(text: str) -> int | list[int]:
    """`9` as 9, `44,84` as [44, 84]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < _MOST_SLOTS for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of slots (9) nor one for every rank (44,84)")
    counts = [int(part) for part in parts]
    return counts[0] if len(counts) == 1 else counts
