"""Tokens and loads of instances, from the recipe that a description states: a generator with its numbers and a seed,
a trace file, or numbers written out.

Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import FormatError, MoeplaceError
from moeplace.profiling.synthetic import traces as synthetic
from moeplace.profiling.synthetic.workloads import make_workload
from moeplace.profiling.traces.trace import RoutingTrace

Recipe = Mapping[str, Any]


class AbsentTraceError(MoeplaceError):
    """A recorded trace that an instance needs is not on this machine."""


def make_trace(recipe: Recipe, traces: Path | None) -> RoutingTrace:
    """The trace of a recipe.

    Args:
        recipe: `generator` and its numbers, or `file`; `ragged`, `top_k` and `split` apply to either.
        traces: folder of recorded traces, None = there is none.

    Raises:
        AbsentTraceError: the recipe names a file that is not there.
        FormatError: no such generator, or it wants other numbers.
    """
    numbers = {key: value for key, value in recipe.items() if key not in ("generator", "file", "ragged", "split")}
    if "file" in recipe:
        trace = _recorded(recipe, traces)
    else:
        name = str(recipe.get("generator"))
        if name not in _GENERATORS:
            raise FormatError(f"generator {name!r} must be one of {', '.join(_GENERATORS)}")
        try:
            trace = _GENERATORS[name](numbers)
        except (KeyError, TypeError) as error:
            raise FormatError(f"generator {name!r}: {error}") from error
    if "ragged" in recipe:
        trace = synthetic.ragged(trace, float(recipe["ragged"]), seed=int(recipe.get("seed", 0)))
    return trace.split(recipe.get("split", "all"))


def make_loads(recipe: Recipe) -> np.ndarray:
    """(L, E) float64 loads: `rows` written out, or whole numbers of a total dealt by Zipf or log-normal shares.

    Raises:
        FormatError: the recipe is of another form.
    """
    if "rows" in recipe:
        return np.asarray(recipe["rows"], dtype=np.float64)
    rng = np.random.default_rng(int(recipe.get("seed", 0)))
    try:
        share_LE = _shares(recipe, rng)
        load_LE = np.rint(share_LE * float(recipe.get("total", 1e6)))
    except KeyError as error:
        raise FormatError(f"loads lack {error}") from error
    return np.asarray(load_LE, dtype=np.float64)


def drifted(load_LE: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Loads times exp(sigma x standard normal): what they may have been some time ago."""
    return np.asarray(load_LE * np.exp(sigma * np.random.default_rng(seed).standard_normal(load_LE.shape)))


def _shares(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    layers, experts = int(recipe["layers"]), int(recipe["experts"])
    if "zipf" in recipe:
        return synthetic.zipf_shares(layers, experts, exponent=float(recipe["zipf"]), rng=rng)
    return synthetic.lognormal_shares(layers, experts, sigma=float(recipe["lognormal"]), rng=rng)


def _markov(numbers: dict[str, Any]) -> RoutingTrace:
    shares_LE = _shares(numbers, np.random.default_rng(int(numbers["seed"])))
    return synthetic.markov(
        shares_LE,
        num_tokens=numbers["tokens"],
        top_k=numbers["top_k"],
        stickiness=numbers["stickiness"],
        seed=numbers["seed"],
    )


def _sizes(numbers: dict[str, Any]) -> dict[str, int]:
    names = {"num_tokens": "tokens", "num_layers": "layers", "num_experts": "experts", "top_k": "top_k", "seed": "seed"}
    return {ours: int(numbers[theirs]) for ours, theirs in names.items()}


_GENERATORS: dict[str, Callable[[dict[str, Any]], RoutingTrace]] = {
    "markov": _markov,
    "topics": lambda n: synthetic.topics(**_sizes(n), num_topics=n["topics"], contrast=n["contrast"]),
    "planted": lambda n: synthetic.planted(**_sizes(n), num_ranks=n["blocks"], epsilon=n["epsilon"])[0],
    "identity-path": lambda n: synthetic.identity_path(**_sizes(n)),
    "drifting": lambda n: synthetic.drifting(**_sizes(n), stickiness=n["stickiness"]),
    "workload": lambda n: make_workload(n["name"], **_sizes(n), num_ranks=n["blocks"]).trace,
}


def _recorded(recipe: Recipe, traces: Path | None) -> RoutingTrace:
    """An interchange `.npz` (`experts`, `sequence_ids`) of the folder of traces."""
    if traces is None or not (traces / recipe["file"]).exists():
        raise AbsentTraceError(f"{recipe['file']} is not on this machine (--traces DIR, or MOEPLACE_TRACES)")
    with np.load(traces / recipe["file"]) as arrays:
        ids_TLK, sequence_T = arrays["experts"], arrays["sequence_ids"]
    trace = RoutingTrace(ids_TLK, np.full(ids_TLK.shape[1], int(recipe["experts"])), sequence_ids=sequence_T)
    return trace.truncate(int(recipe["top_k"])) if "top_k" in recipe else trace
