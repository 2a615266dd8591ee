"""RecordingCounts: scores of many recordings of one model, counted one by one and added up.

Each recording is read once, on whatever machine has it; what travels are tables. Counts of the whole are those of all
recordings one after another: every score here is the one of `summarize` on the joined trace, but that tokens are
shuffled inside their recording, and that the windows of time are the recordings themselves. SRP and SCH need tokens in
order and are not among them.

Shape letters: L MoE layers, E experts per layer, G recordings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import CHUNK_TOKENS, chunks
from moeplace.profiling.scores.affinity import (
    Affinity,
    grouped_loads,
    load_skew,
    mutual_information,
    primary_experts,
    total_variation,
)
from moeplace.profiling.scores.summary import (
    FORMAT,
    affinity_figures,
    coactivation_figures,
    count_assigned,
    load_figures,
)
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.kernels import count_weighted
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace

_OF_EACH = ("name", "tokens", "sequences")
"""What is said of every recording by itself."""


@dataclass(frozen=True, eq=False)
class Side:
    """Counts of some of the tokens.

    Attributes:
        load: (L, E) int64.
        transitions: (L-1, E, E) int64 between primary experts.
        num_tokens: of that side.
    """

    load: np.ndarray
    transitions: np.ndarray
    num_tokens: int

    @classmethod
    def of(cls, trace: RoutingTrace, is_here_T: np.ndarray) -> Self:
        """The tokens of a trace that are here."""
        experts_L, most = trace.experts_per_layer, trace.num_experts
        load_LE = np.zeros((len(experts_L), most), np.int64)
        transitions_LEE = np.zeros((len(experts_L) - 1, most, most), np.int64)
        weights_T = is_here_T.astype(np.int64)
        for number, ids_TLK in enumerate(chunks(trace.topk_ids)):
            start = number * CHUNK_TOKENS
            piece_T = weights_T[start : start + len(ids_TLK)]
            count_weighted(ids_TLK, piece_T, experts_L, load_LE, transitions_LEE)
        return cls(load_LE, transitions_LEE, int(is_here_T.sum()))

    def plus(self, other: "Side") -> "Side":
        """The tokens of both."""
        tokens = self.num_tokens + other.num_tokens
        return Side(self.load + other.load, self.transitions + other.transitions, tokens)

    def distance_from_rest(self, stats: RoutingStats) -> dict[str, float | None]:
        """Total variation of load and transitions between this side and all other tokens; None where one is empty."""
        if self.num_tokens in (0, stats.num_tokens):
            return {"load_tv": None, "transitions_tv": None}
        pairs = self.transitions.reshape(len(self.transitions), -1)
        rest = (stats.transitions - self.transitions).reshape(pairs.shape)
        return {
            "load_tv": float(total_variation(self.load, stats.load - self.load).mean()),
            "transitions_tv": float(total_variation(pairs, rest).mean()) if len(pairs) else None,
        }


@dataclass(frozen=True, eq=False)
class RecordingCounts:
    """Counts of one or more recordings of one model.

    Attributes:
        stats: of all tokens.
        shuffled: (L-1, E, E) int64 transitions after shuffling the tokens of the later layer in each recording.
        sides: "train_test" (sequences of odd number), "random_halves" and "decoded" tokens; a side that some recording
            does not tell is left out.
        workloads: load (L, E) and tokens by workload; None = some recording does not tell.
        recordings: by the number of the recording: what it was, and its load (L, E).
        assigned: choices, null experts included.
        model: what recordings of one model have in common.
    """

    stats: RoutingStats
    shuffled: np.ndarray
    sides: Mapping[str, Side]
    workloads: Mapping[str, tuple[np.ndarray, int]] | None
    recordings: Mapping[int, tuple[dict[str, Any], np.ndarray]]
    assigned: int
    model: Mapping[str, Any]

    @classmethod
    def of(cls, trace: RoutingTrace, *, name: str, number: int = 0, seed: int) -> Self:
        """Count one recording.

        Args:
            trace: its tokens.
            name: for people.
            number: among the recordings; decides their order, and the shuffles together with `seed`.
            seed: of the shuffles.
        """
        stats = RoutingStats.from_trace(trace)
        ids = None if trace.sequence_ids is None else np.asarray(trace.sequence_ids)
        sides = {}
        if ids is not None:
            known, sequence_T = np.unique(ids, return_inverse=True)
            drawn = np.random.default_rng([seed, number]).random(len(known)) < 0.5
            sides = {"train_test": Side.of(trace, ids % 2 == 1), "random_halves": Side.of(trace, drawn[sequence_T])}
        if trace.is_decode is not None:
            sides["decoded"] = Side.of(trace, np.asarray(trace.is_decode, dtype=bool))
        what = {
            "name": name,
            "tokens": trace.num_tokens,
            "sequences": None if ids is None else len(known),
            "adapters": list(trace.adapter_names),
            "notes": list(trace.notes),
        }
        assigned = count_assigned(trace, stats)
        shuffled = _shuffled_transitions(trace, number, seed)
        recordings = {number: (what, stats.load)}
        return cls(stats, shuffled, sides, _workload_loads(trace), recordings, assigned, _model(trace))

    def merge(self, other: "RecordingCounts") -> Self:
        """The counts of both, in whatever order they come.

        Raises:
            InputError: they are not of one model shape.
        """
        mine, theirs = min(self.recordings), min(other.recordings)
        if theirs < mine:
            return other.merge(self)  # type: ignore[return-value]
        for what, value in self.model.items():
            if what not in ("model", "bytes") and value != other.model[what]:
                names = [counts.recordings[first][0]["name"] for counts, first in ((other, theirs), (self, mine))]
                raise InputError(
                    f"{names[0]} has other {what.replace('_', ' ')} ({other.model[what]}) than {names[1]} ({value}): "
                    "recordings must be of one model"
                )
        return replace(
            self,
            stats=self.stats.merge(other.stats),
            shuffled=self.shuffled + other.shuffled,
            sides={name: side.plus(other.sides[name]) for name, side in self.sides.items() if name in other.sides},
            workloads=_joined(self.workloads, other.workloads),
            recordings={**self.recordings, **other.recordings},
            assigned=self.assigned + other.assigned,
        )


def count_file(seed: int, recording: tuple[int, str, str]) -> RecordingCounts:
    """The counts of a trace file; `recording` = (number, name for people, path)."""
    number, name, path = recording
    return RecordingCounts.of(load_trace(path), name=name, number=number, seed=seed)


def summarize_recordings(counts: RecordingCounts, *, seed: int) -> dict[str, Any]:
    """The document of `moeplace stats` over all recordings, without SRP, SCH and scores by adapter.

    Args:
        counts: of all of them.
        seed: that they were counted with.
    """
    return {
        "format": FORMAT,
        "seed": seed,
        "trace": _shape(counts),
        "recordings": [{name: what[name] for name in _OF_EACH} for what, _ in _in_order(counts)],
        "load": load_figures(counts.stats),
        "affinity": _affinity(counts),
        "coactivation": coactivation_figures(counts.stats),
        "stability": _stability(counts),
    }


def _model(trace: RoutingTrace) -> dict[str, Any]:
    return {
        "MoE_layers": trace.num_layers,
        "experts_per_layer": trace.experts_per_layer.tolist(),
        "top_k": trace.top_k,
        "decoder_layers": np.asarray(trace.layer_ids).tolist(),
        "num_hidden_layers": trace.num_hidden_layers,
        "model": trace.model,
        "bytes": None if trace.expert_bytes is None else int(trace.expert_bytes.sum()),
    }


def _shuffled_transitions(trace: RoutingTrace, number: int, seed: int) -> np.ndarray:
    """(L-1, E, E) int64 pairs by popularity alone: of the first recording, the draws of `affinity`."""
    primary_LT, experts = primary_experts(trace), trace.num_experts
    tables = np.zeros((max(trace.num_layers - 1, 0), experts, experts), np.int64)
    for boundary, table_EE in enumerate(tables):
        i_T, j_T = primary_LT[boundary], primary_LT[boundary + 1]
        both_T = (i_T >= 0) & (j_T >= 0)
        drawn = np.random.default_rng([seed, boundary, number]).permutation(j_T[both_T])
        table_EE += np.bincount(i_T[both_T].astype(np.int64) * experts + drawn, minlength=experts**2).reshape(
            experts, experts
        )
    return tables


def _workload_loads(trace: RoutingTrace) -> dict[str, tuple[np.ndarray, int]] | None:
    if trace.workload is None:
        return None
    names = trace.workload_names
    loads = grouped_loads(trace, np.asarray(trace.workload), num_groups=len(names))
    tokens = np.bincount(trace.workload[trace.workload >= 0], minlength=len(names)).tolist()
    return {name: (load_LE, count) for name, load_LE, count in zip(names, loads, tokens, strict=True)}


_Workloads = Mapping[str, tuple[np.ndarray, int]] | None


def _joined(mine: _Workloads, theirs: _Workloads) -> _Workloads:
    if mine is None or theirs is None:
        return None
    both = dict(mine)
    for name, (load_LE, tokens) in theirs.items():
        own = both.get(name)
        both[name] = (load_LE, tokens) if own is None else (own[0] + load_LE, own[1] + tokens)
    return both


def _in_order(counts: RecordingCounts) -> list[tuple[dict[str, Any], np.ndarray]]:
    return [counts.recordings[number] for number in sorted(counts.recordings)]


def _shape(counts: RecordingCounts) -> dict[str, Any]:
    found = [what for what, _ in _in_order(counts)]
    stats, model = counts.stats, counts.model
    sequences = [what["sequences"] for what in found]
    decoded = counts.sides.get("decoded")
    return {
        "model": model["model"],
        "tokens": int(stats.num_tokens),
        "sequences": None if None in sequences else sum(sequences),
        "layers": stats.num_layers,
        "layer_ids": model["decoder_layers"],
        "num_hidden_layers": model["num_hidden_layers"],
        "experts": stats.num_experts,
        "experts_per_layer": model["experts_per_layer"],
        "top_k": model["top_k"],
        "mean_top_k_by_layer": (stats.load.sum(axis=1) / max(stats.num_tokens, 1)).tolist(),
        "decode_tokens": None if decoded is None else decoded.num_tokens,
        "workloads": {name: tokens for name, (_, tokens) in (counts.workloads or {}).items()},
        "adapters": _union(found, "adapters"),
        "null_share": 1 - float(stats.load.sum()) / max(counts.assigned, 1),
        "bytes": model["bytes"],
        "notes": _union(found, "notes"),
    }


def _union(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """What any recording has, once, in the order of recordings."""
    return list(dict.fromkeys(each for what in found for each in what[name]))


def _affinity(counts: RecordingCounts) -> dict[str, Any]:
    bits, control = (
        np.array([mutual_information(table_EE) for table_EE in tables])
        for tables in (counts.stats.transitions, counts.shuffled)
    )
    return affinity_figures(Affinity(bits, control, int(counts.stats.num_tokens)))


def _stability(counts: RecordingCounts) -> dict[str, Any]:
    loads = np.stack([load_LE for _, load_LE in _in_order(counts)])
    experts_L = counts.stats.experts_per_layer
    document: dict[str, Any] = {
        "windows": {
            "are": "recordings",
            "load_tv_from_all": total_variation(loads, loads.sum(axis=0)).mean(axis=1).tolist(),
            "load_tv_from_previous": total_variation(loads[1:], loads[:-1]).mean(axis=1).tolist(),
            "skew_mean": [float(load_skew(load_LE, experts_L).mean()) for load_LE in loads],
        }
    }
    sides = dict(counts.sides)
    decoded = sides.pop("decoded", None)
    document |= {name: side.distance_from_rest(counts.stats) for name, side in sides.items()}
    if decoded is not None and 0 < decoded.num_tokens < counts.stats.num_tokens:
        document["prefill_decode"] = {"load_tv": decoded.distance_from_rest(counts.stats)["load_tv"]}
    if counts.workloads is not None and len(counts.workloads) > 1:
        known = sum(load_LE for load_LE, _ in counts.workloads.values())
        document["workloads"] = {
            name: float(total_variation(load_LE, known - load_LE).mean())
            for name, (load_LE, _) in counts.workloads.items()
        }
    return document
