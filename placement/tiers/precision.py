"""Precision per expert: which experts to keep in fewer bits, where the bytes of a rank do not hold all of them exactly.

    minimise    sum over experts of error[precision of the expert]
    subject to  sum over the experts of a rank of bytes[precision] <= the rank's budget          for every rank

Each rank is a multiple-choice knapsack by itself. Small ones are solved exactly, by dynamic programming over bytes in
units of their greatest common divisor (Dudzinski & Walukiewicz 1987). Large ones greedily along the lower hulls of each
expert's (bytes, error), whose fractional optimum is the bound.

Errors are those of one expert alone, as shares of what its layer puts out; that they add up is an assumption, which
`moeplace bench precision` sets beside the logits. Precision 0 is exact.

Shape letters: L MoE layers, E experts per layer, P precisions, R ranks, N experts of a rank.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write, read_json

FORMAT = "moeplace.precision/1"
MOST_STATES = 20_000_000
"""(expert, byte units) of a rank up to which it is solved exactly: a second, and 20 MB of choices."""
_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class PrecisionCosts:
    """What each precision of each expert takes and spoils.

    Attributes:
        names: (P,) precisions, the exact one first.
        bytes_LEP: int64, positive for experts that exist.
        error_LEP: squared error of the layer's output, as a share of its square; 0 for the exact one.
        experts_per_layer: (L,).
    """

    names: tuple[str, ...]
    bytes_LEP: np.ndarray
    error_LEP: np.ndarray
    experts_per_layer: np.ndarray

    def __post_init__(self) -> None:
        if self.names[:1] != ("exact",) or len(set(self.names)) < len(self.names):
            raise InputError(f"precisions ({', '.join(self.names)}) must be named once each, exact first")
        if self.experts_per_layer.ndim != 1:
            raise InputError("experts per layer must be one number a layer")
        shape = (len(self.experts_per_layer), int(np.max(self.experts_per_layer)), len(self.names))
        if self.bytes_LEP.shape != shape or self.error_LEP.shape != shape:
            raise InputError(f"bytes and errors of precisions must have shape {shape}")
        if not (self.error_LEP >= 0).all() or (self.error_LEP[:, :, 0] != 0).any():
            raise InputError("errors of precisions must not be negative, and 0 for the exact one")
        is_real_LE = np.arange(shape[1]) < self.experts_per_layer[:, None]
        if not (self.bytes_LEP[is_real_LE] > 0).all():
            raise InputError("bytes of experts must be positive in every precision")

    def error_of(self, choice_LE: np.ndarray) -> float:
        """Error of a choice of precisions, summed over layers."""
        return float(np.take_along_axis(self.error_LEP, choice_LE[:, :, None], axis=2).sum())


@dataclass(frozen=True, eq=False)
class PrecisionPlan:
    """A precision for every expert.

    Attributes:
        costs: what it was chosen from.
        choice_LE: (L, E) index of `costs.names`.
        bytes_R: bytes that each rank keeps.
        error: predicted, summed over layers.
        lower_bound: no choice within the budgets has less.
    """

    costs: PrecisionCosts
    choice_LE: np.ndarray
    bytes_R: np.ndarray
    error: float
    lower_bound: float

    @property
    def chosen(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of precisions, and the (L, E) choice among them."""
        return self.costs.names, self.choice_LE

    @property
    def bytes_LE(self) -> np.ndarray:
        """(L, E) int64 bytes of each expert in its precision."""
        return np.take_along_axis(self.costs.bytes_LEP, self.choice_LE[:, :, None], axis=2)[:, :, 0]

    def summary(self) -> dict[str, Any]:
        """What is not exact, ready for JSON."""
        return {"experts": self.counts(), "predicted_error": self.error}

    def counts(self) -> dict[str, int]:
        """Experts by precision."""
        real = np.arange(self.choice_LE.shape[1]) < self.costs.experts_per_layer[:, None]
        found = np.bincount(self.choice_LE[real], minlength=len(self.costs.names))
        return dict(zip(self.costs.names, found.tolist(), strict=True))


class _Choice(NamedTuple):
    choice_N: np.ndarray
    bound: float


def plan_precision(costs: PrecisionCosts, placement: Placement, budget_R: np.ndarray) -> PrecisionPlan:
    """Choose precisions of least error that fit the bytes of every rank.

    Args:
        costs: see there.
        placement: which rank has which experts.
        budget_R: (R,) bytes of experts, over all layers.

    Raises:
        InputError: experts have replicas, which would tie ranks together; the placement is for other experts; or a
            rank's budget does not hold its experts in the fewest bytes there are.
    """
    if placement.has_replicas:
        raise InputError("precisions are planned for placements without replicas")
    if not np.array_equal(placement.experts_per_layer, costs.experts_per_layer):
        raise InputError("the placement is for another number of layers or experts than the errors of precisions")
    choice_LE = np.zeros(costs.bytes_LEP.shape[:2], np.int64)
    bound = 0.0
    for rank in range(placement.num_ranks):
        layer, expert = np.nonzero(placement.rank_of_expert == rank)
        if not len(layer):
            continue
        bytes_NP, error_NP = costs.bytes_LEP[layer, expert], costs.error_LEP[layer, expert]
        least = int(bytes_NP.min(axis=1).sum())
        if least > budget_R[rank]:
            raise InputError(
                f"rank {rank} has a budget of {int(budget_R[rank])} bytes, its experts take at least {least}"
            )
        found = choose(bytes_NP, error_NP, int(budget_R[rank]))
        choice_LE[layer, expert] = found.choice_N
        bound += found.bound
    error = costs.error_of(choice_LE)
    return PrecisionPlan(costs, choice_LE, bytes_by_rank(costs, placement, choice_LE), error, min(bound, error))


def bytes_by_rank(costs: PrecisionCosts, placement: Placement, choice_LE: np.ndarray) -> np.ndarray:
    """(R,) int64 bytes of the experts of each rank, a replica being as many again."""
    bytes_LE = np.take_along_axis(costs.bytes_LEP, choice_LE[:, :, None], axis=2)[:, :, 0]
    return np.einsum("le,ler->r", bytes_LE, placement.copies_LER.astype(np.int64))


def choose(bytes_NP: np.ndarray, error_NP: np.ndarray, budget: int, *, most_states: int = MOST_STATES) -> _Choice:
    """One rank: exactly where that is small, else greedily; its bound is the exact error or that of fractions."""
    unit = max(int(np.gcd.reduce(bytes_NP, axis=None)), 1)
    units = (min(budget, int(bytes_NP.max(axis=1).sum()))) // unit
    if len(bytes_NP) * (units + 1) <= most_states:
        choice_N = _exact(bytes_NP // unit, error_NP, units)
        return _Choice(choice_N, float(np.take_along_axis(error_NP, choice_N[:, None], axis=1).sum()))
    return _greedy(bytes_NP, error_NP, budget)


def _exact(weight_NP: np.ndarray, error_NP: np.ndarray, room: int) -> np.ndarray:
    """Dynamic programming over the units that are taken so far."""
    best = np.zeros(room + 1)
    taken_NU = np.zeros((len(weight_NP), room + 1), np.int8)
    for n, (weight_P, error_P) in enumerate(zip(weight_NP.tolist(), error_NP.tolist(), strict=True)):
        before, best = best, np.full(room + 1, np.inf)
        for p, (weight, error) in enumerate(zip(weight_P, error_P, strict=True)):
            if weight > room:
                continue
            value = np.full(room + 1, np.inf)
            value[weight:] = before[: room + 1 - weight] + error
            less = value < best
            best[less] = value[less]
            taken_NU[n, less] = p
    choice_N, left = np.zeros(len(weight_NP), np.int64), room
    for n in range(len(weight_NP) - 1, -1, -1):
        choice_N[n] = taken_NU[n, left]
        left -= int(weight_NP[n, choice_N[n]])
    return choice_N


def _greedy(bytes_NP: np.ndarray, error_NP: np.ndarray, budget: int) -> _Choice:
    """Along the hulls, the most error saved per byte first; steps that do not fit are passed over."""
    choice_N = np.zeros(len(bytes_NP), np.int64)
    steps = []
    for n, (bytes_P, error_P) in enumerate(zip(bytes_NP, error_NP, strict=True)):
        hull = _hull(bytes_P, error_P)
        choice_N[n] = hull[0]
        for a, b in itertools.pairwise(hull):
            more, less = int(bytes_P[b] - bytes_P[a]), float(error_P[a] - error_P[b])
            steps.append((-less / more, n, b, more, less))
    left = budget - int(np.take_along_axis(bytes_NP, choice_N[:, None], axis=1).sum())
    error = float(np.take_along_axis(error_NP, choice_N[:, None], axis=1).sum())
    bound, is_whole, stopped = error, True, set[int]()
    for _, n, p, more, less in sorted(steps):
        if is_whole and more > left:  # the fractional optimum ends here
            bound, is_whole = bound - less * left / more, False
        if more <= left and n not in stopped:
            choice_N[n], left = p, left - more
            bound -= less if is_whole else 0.0
        else:
            stopped.add(n)  # its further steps begin where this one ends
    return _Choice(choice_N, max(bound, 0.0))


def _hull(bytes_P: np.ndarray, error_P: np.ndarray) -> list[int]:
    """Precisions on the lower hull of (bytes, error), from the fewest bytes on, each with less error than the last."""
    hull: list[int] = []
    for p in np.lexsort((error_P, bytes_P)).tolist():
        if hull and error_P[p] >= error_P[hull[-1]] - _TOLERANCE * error_P[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(bytes_P, error_P, hull[-2], hull[-1]) >= _slope(bytes_P, error_P, hull[-1], p):
            hull.pop()
        if hull and bytes_P[hull[-1]] == bytes_P[p]:
            hull.pop()
        hull.append(p)
    return hull


def _slope(bytes_P: np.ndarray, error_P: np.ndarray, a: int, b: int) -> float:
    return float(error_P[b] - error_P[a]) / max(float(bytes_P[b] - bytes_P[a]), 1e-300)


def save_precision(path: str | Path, plan: PrecisionPlan) -> None:
    """Write a plan with the costs that it was chosen from, atomically."""
    costs = plan.costs
    document: dict[str, Any] = {
        "format": FORMAT, "precisions": list(costs.names), "experts_per_layer": costs.experts_per_layer.tolist(),
        "precision": plan.choice_LE.tolist(), "bytes": costs.bytes_LEP.tolist(), "error": costs.error_LEP.tolist(),
        "bytes_per_rank": plan.bytes_R.tolist(), "predicted_error": plan.error, "lower_bound": plan.lower_bound,
    }  # fmt: skip
    with atomic_write(path) as file:
        file.write((json.dumps(document) + "\n").encode())


def load_precision(path: str | Path) -> PrecisionPlan:
    """Read what `save_precision` wrote.

    Raises:
        InputError: there is no such file.
        FormatError: it is something else, or damaged.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(f"{path} is not a file of precisions: it lacks the tag {FORMAT!r}")
    try:
        costs = PrecisionCosts(
            tuple(map(str, document["precisions"])), _whole(document, "bytes"), np.array(document["error"], float),
            _whole(document, "experts_per_layer"),
        )  # fmt: skip
        choice_LE, bytes_R = _whole(document, "precision"), _whole(document, "bytes_per_rank")
        if choice_LE.shape != costs.bytes_LEP.shape[:2] or not np.isin(choice_LE, range(len(costs.names))).all():
            raise ValueError("a precision is out of range")
        spoiled, bound = float(document["predicted_error"]), float(document["lower_bound"])
        if not 0 <= bound <= spoiled < np.inf:
            raise ValueError(f"its lower bound ({bound:g}) must lie in 0..{spoiled:g}, its predicted error")
        summed = costs.error_of(choice_LE)
        if not np.isclose(spoiled, summed, rtol=1e-6, atol=0.0):
            raise ValueError(f"its predicted error ({spoiled:g}) is not that of its precisions ({summed:g})")
        return PrecisionPlan(costs, choice_LE, bytes_R, spoiled, bound)
    except KeyError as error:
        raise FormatError(f"{path} is not a file of precisions: it lacks {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path} is not a file of precisions: {error}") from error


def _whole(document: dict[str, Any], name: str) -> np.ndarray:
    """int64 numbers of a file, which must not be fractions."""
    value = np.array(document[name])
    if value.dtype.kind != "i":
        raise ValueError(f"{name} must be whole numbers of 64 bits")
    return value.astype(np.int64)
