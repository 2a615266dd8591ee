"""A trace in another mix of its workloads or adapters: what a placement is to be fitted to when tomorrow differs.

Shape letters: T tokens.
"""

from collections.abc import Mapping

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.sampling import sequence_rows
from moeplace.profiling.traces.trace import BASE_MODEL, RoutingTrace, Tag

BASE_NAME = "base"
"""What tokens without an adapter are called in a mix."""


def parse_mix(text: str) -> dict[str, float]:
    """`a=3,b=1` as shares that sum to 1.

    Raises:
        InputError: it is something else.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = (piece.strip() for piece in part.rpartition("="))
        try:
            shares[name] = float(amount)
        except ValueError:
            shares = {}
        if not name or not 0 <= shares.get(name, -1) < float("inf"):
            raise InputError(f"mix {text!r} must be names with shares that are not negative, such as a=3,b=1")
    total = sum(shares.values())
    if not total:
        raise InputError(f"mix {text!r} must have a share above 0")
    return {name: share / total for name, share in shares.items()}


def mix(trace: RoutingTrace, shares: Mapping[str, float], *, seed: int) -> RoutingTrace:
    """As many tokens as `trace` has, in these shares, by whole sequences.

    Sequences of a tag are drawn without repetition until all were drawn, then again. A sequence belongs to the tag of
    its first token and stays on its side of the split.

    Args:
        trace: with workload or adapter tags.
        shares: by name of a workload or an adapter (`base` = no adapter); what is not named gets nothing.
        seed: of the draws.

    Raises:
        InputError: the trace has no such tag, or no token of it.
    """
    tag_T, names = _tags(trace, shares)
    rows = sequence_rows(trace)
    first_tag = np.array([tag_T[part[0]] for part in rows])
    rng = np.random.default_rng(seed)
    picked: list[np.ndarray] = []
    for name, share in shares.items():
        own = np.flatnonzero(first_tag == names[name])
        wanted = round(share * trace.num_tokens)
        if wanted and not len(own):
            raise InputError(f"the mix asks for {name!r}, of which the trace has no token")
        picked += _draw([rows[index] for index in own], wanted, rng)
    lengths = [len(part) for part in picked]
    ids_T = trace.sequence_ids
    parity = np.array([0 if ids_T is None else ids_T[part[0]] % 2 for part in picked])
    numbers = 2 * np.arange(len(picked)) + parity
    mixed = trace.select(np.concatenate(picked))
    sequence_ids = None if ids_T is None else np.repeat(numbers, lengths)
    return mixed.replace(sequence_ids=sequence_ids, validate=False)


def _draw(sequences: list[np.ndarray], wanted: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sequences in random order, all before any again; the last one is cut."""
    drawn: list[np.ndarray] = []
    while wanted > 0:
        for index in rng.permutation(len(sequences)):
            drawn.append(sequences[index][:wanted])
            wanted -= len(drawn[-1])
            if wanted <= 0:
                break
    return drawn


def _tags(trace: RoutingTrace, shares: Mapping[str, float]) -> tuple[np.ndarray, dict[str, int]]:
    """(T,) tag of each token and the numbers of the names: of adapters if the names are theirs, else of workloads."""
    known: dict[Tag, dict[str, int]] = {
        "adapter": {BASE_NAME: BASE_MODEL} | {name: i for i, name in enumerate(trace.adapter_names)},
        "workload": {name: i for i, name in enumerate(trace.workload_names)},
    }
    for tag, names in known.items():
        index_T = getattr(trace, tag)
        if index_T is not None and set(shares) <= set(names):
            return np.asarray(index_T, dtype=np.int64), names
    every = [name for names in known.values() for name in names if name != BASE_NAME]
    unknown = next((name for name in shares if name not in every), next(iter(shares)))
    raise InputError(f"the mix names {unknown!r}; the trace has the tags {every}")
