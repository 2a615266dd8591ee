"""Synthetic workloads W0-W7 with their exact expected load: oracles for balance, counters and re-placement.

Experts in index order lie on ranks in blocks of E / R. The loads are exact, not drawn: target counts are dealt to the
tokens so that no token gets an expert twice. Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace

NAMES = ("W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7")
DESCRIPTIONS = {
    "W0": "balanced: every expert has the same load",
    "W1": "a hot expert set: one eighth of the experts has half of the load",
    "W2": "a hot rank: the experts of one rank have half of the load",
    "W3": "heat spread over ranks: one hot expert on every rank, together half of the load",
    "W4": "ragged over sources: balanced load, sources with 1 : 2 : ... : R tokens",
    "W5": "a rank with no tokens: the experts of one rank are never chosen",
    "W6": "a rotating hot spot: in window w the experts of rank w have half of the load",
    "W7": "a burst: balanced, but in the middle tenth of the tokens one rank's experts have half of the load",
}


@dataclass(frozen=True, eq=False)
class Workload:
    """A trace and what must be counted in it.

    Attributes:
        name: W0..W7.
        trace: the trace; sequences are sources for W4, windows of time for W6 and W7.
        expected_load: (L, E) int64 load of the whole trace.
        window_loads: (W, L, E) int64 load of each sequence.
    """

    name: str
    trace: RoutingTrace
    expected_load: np.ndarray
    window_loads: np.ndarray


def make_workload(
    name: str, *, num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_ranks: int, seed: int
) -> Workload:
    """Generate a workload; every window's load is met exactly.

    Raises:
        InputError: there is no such workload, or the sizes do not allow it.
    """
    if name not in NAMES:
        raise InputError(f"workload {name!r} is not one of {', '.join(NAMES)}")
    if num_experts % num_ranks or num_ranks < 2:
        raise InputError(f"experts ({num_experts}) must be a multiple of ranks ({num_ranks}), which are at least 2")
    rng = np.random.default_rng(seed)
    sizes, shares_WE = _windows(name, num_tokens, num_experts, num_ranks)
    pieces, loads = [], []
    for size, share_E in zip(sizes, shares_WE, strict=True):
        counts_E = _apportion(share_E, size * top_k, size, name)
        piece_TLK = np.stack([_deal(counts_E, size, top_k, rng) for _ in range(num_layers)], axis=1)
        pieces.append(piece_TLK)
        loads.append(np.tile(counts_E, (num_layers, 1)))
    trace = RoutingTrace(
        np.concatenate(pieces).astype(np.int32),
        np.full(num_layers, num_experts),
        sequence_ids=np.repeat(np.arange(len(sizes)), sizes),
        model=f"workload {name}",
        notes=(DESCRIPTIONS[name],),
    )
    return Workload(name, trace, np.sum(loads, axis=0), np.stack(loads))


def _windows(name: str, tokens: int, experts: int, ranks: int) -> tuple[list[int], list[np.ndarray]]:
    """(tokens, shares (E,)) of each window of a workload."""
    even_E = np.full(experts, 1 / experts)
    rank_E = np.arange(experts) // (experts // ranks)
    if name == "W1":
        return [tokens], [_half_on(np.arange(experts) < max(experts // 8, 1))]
    if name == "W2":
        return [tokens], [_half_on(rank_E == ranks - 1)]
    if name == "W3":
        return [tokens], [_half_on(np.arange(experts) % (experts // ranks) == 0)]
    if name == "W4":
        edges = [tokens * (r * (r + 1)) // (ranks * (ranks + 1)) for r in range(ranks + 1)]
        return list(np.diff(edges)), [even_E] * ranks
    if name == "W5":
        return [tokens], [np.where(rank_E == 0, 0.0, 1 / (experts - experts // ranks))]
    if name == "W6":
        edges = [tokens * r // ranks for r in range(ranks + 1)]
        return list(np.diff(edges)), [_half_on(rank_E == rank) for rank in range(ranks)]
    if name == "W7":
        start, burst = tokens * 45 // 100, tokens // 10
        return [start, burst, tokens - start - burst], [even_E, _half_on(rank_E == 0), even_E]
    return [tokens], [even_E]


def _half_on(hot_E: np.ndarray) -> np.ndarray:
    """Shares with half of the load on the hot experts; all of it where every expert is hot."""
    cold = int((~hot_E).sum())
    return np.where(hot_E, (0.5 if cold else 1.0) / hot_E.sum(), 0.5 / max(cold, 1))


def _apportion(share_E: np.ndarray, total: int, most: int, name: str) -> np.ndarray:
    """(E,) integers that sum to `total`, by largest remainders, none above `most` (the tokens).

    Raises:
        InputError: an expert would have to serve a token twice.
    """
    exact_E = share_E * total
    counts_E = np.floor(exact_E + 1e-9).astype(np.int64)
    remainder_E = np.where(share_E > 0, exact_E - counts_E, -1.0)
    counts_E[np.argsort(-remainder_E, kind="stable")[: total - counts_E.sum()]] += 1
    if counts_E.max(initial=0) > most:
        raise InputError(f"workload {name} needs {counts_E.max()} uses of one expert by {most} tokens: lower top-k")
    return counts_E


def _deal(counts_E: np.ndarray, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """(tokens, K) ids with exactly these counts: copies of an expert go to consecutive tokens, so to different ones."""
    cards = rng.permutation(len(counts_E))
    deck = np.repeat(cards, counts_E[cards])
    dealt_TK = deck.reshape(top_k, tokens).T  # card i goes to token i mod T
    return rng.permuted(dealt_TK[rng.permutation(tokens)], axis=1)
