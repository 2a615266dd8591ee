"""Bounds that need no certificate, computed again: ranks per token of a layer, stayed tokens of a boundary, load.

Formulas and proofs: docs/model.md. Shape letters: T tokens, E experts, K top-k, R ranks, S slots.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.verification.statement import Statement

SAFETY = 1e-9
"""Taken off what comes from floating-point eigenvalues."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Ranks, or nodes with all their slots, as the parts of a partition.

    Attributes:
        count: of parts.
        capacity: most slots of one.
        even: all have so many.
        fastest: largest speed of a part over the mean.
    """

    count: int
    capacity: int
    even: bool
    fastest: float

    @classmethod
    def of(cls, statement: Statement, slots_R: np.ndarray, *, nodes: bool) -> "Parts":
        """The ranks, or the nodes, with `slots_R` slots on each rank."""
        node_R = statement.node_R if nodes else np.arange(statement.num_ranks)
        slots_P, speed_P = np.bincount(node_R, slots_R), np.bincount(node_R, statement.speed_R)
        even = bool((slots_P == slots_P[0]).all())
        return cls(len(slots_P), int(slots_P.max()), even, float(speed_P.max() / speed_P.mean()))


def least_ranks(ids_TK: np.ndarray, experts: int, parts: Parts, spare: int, cap: float | None) -> float:
    """Least mean number of parts per token of a layer, over all placements with `spare` redundant slots.

    Args:
        ids_TK: (T, K) expert ids, -1 = none.
        experts: E.
        parts: the parts.
        spare: S - E.
        cap: most load of a part over the mean part's, None = any.
    """
    size_T = (ids_TK >= 0).sum(axis=1)
    total = 0.0
    for size in set(size_T[size_T > 0].tolist()):
        rows_TK = ids_TK[size_T == size]
        member_TE = np.zeros((len(rows_TK), experts))
        token, slot = np.nonzero(rows_TK >= 0)
        member_TE[token, rows_TK[token, slot]] = 1.0
        share = cap if len(rows_TK) == len(ids_TK) else None
        total += len(rows_TK) * _least_of_class(member_TE, int(size), parts, spare, share)
    return total / max(len(ids_TK), 1)


def _least_of_class(member_TE: np.ndarray, size: int, parts: Parts, spare: int, cap: float | None) -> float:
    """Of tokens with `size` experts each."""
    floor = float(np.ceil(size / parts.capacity))
    if size == 1 or parts.capacity == 1:
        return max(floor, float(size))
    joint_EE = member_TE.T @ member_TE
    load_E = np.diag(joint_EE).copy()
    np.fill_diagonal(joint_EE, 0.0)
    tokens = len(member_TE)
    squares = _most_squares(joint_EE, load_E, tokens, parts, spare, cap)
    bounds = [floor, float(np.interp(squares, *_even_splits(size, parts)))]
    if not spare:
        most = np.sort(joint_EE, axis=1)[:, ::-1][:, : parts.capacity - 1].sum(axis=1)
        used = load_E > 0
        number = np.arange(1.0, min(size, parts.capacity) + 1)
        together = 1 + most[used] / load_E[used]
        bounds.append(float(load_E[used] @ np.interp(together, number, 1 / number)) / tokens)
    return max(bounds) - SAFETY


def _even_splits(size: int, parts: Parts) -> tuple[list[float], list[float]]:
    """(sums of squares, numbers of parts) of a set of experts split as evenly as possible, by rising squares."""
    squares, numbers = [], []
    for number in range(min(size, parts.count), int(np.ceil(size / parts.capacity)) - 1, -1):
        whole, rest = divmod(size, number)
        squares.append(float(rest * (whole + 1) ** 2 + (number - rest) * whole**2))
        numbers.append(float(number))
    return squares, numbers


def _most_squares(
    joint_EE: np.ndarray, load_E: np.ndarray, tokens: int, parts: Parts, spare: int, cap: float | None
) -> float:
    """Most mean over tokens of the sum over parts of (the token's experts there) squared."""
    each = load_E.sum() / tokens
    bounds = [each + best_partners(joint_EE, parts.capacity - 1, spare) / tokens]
    if parts.even and not spare:
        centre_EE = _centred(joint_EE)
        values = _orthogonal_to_ones(centre_EE)
        bounds.append(each + (joint_EE.sum() / parts.count + parts.capacity * values[: parts.count - 1].sum()) / tokens)
    if cap is not None and not spare:
        root_E = np.where(load_E > 0, 1 / np.sqrt(np.maximum(load_E, 1e-300)), 0.0)
        scaled = (joint_EE + np.diag(load_E)) * root_E * root_E[:, None]
        values = np.maximum(np.linalg.eigvalsh(scaled)[::-1], 0.0)
        bounds.append(cap * each / parts.count * _first(values, parts.count / cap))
    return min(bounds)


def most_stay(weight_EE: np.ndarray, parts: Parts, spare: int, cap: float | None) -> float:
    """Most tokens of a boundary whose primary expert stays on its part, in units of `weight_EE`.

    Args:
        weight_EE: tokens from expert to expert.
        parts, spare: the parts, redundant slots of the two layers together.
        cap: where row and column sums are the layers' loads: most load of a part over the mean; else None.
    """
    bounds = [best_partners(side, parts.capacity, spare) for side in (weight_EE, weight_EE.T)]
    if parts.even and not spare and weight_EE.shape[0] == weight_EE.shape[1]:
        values = np.linalg.svd(_centred(weight_EE), compute_uv=False)
        bounds.append(weight_EE.sum() / parts.count + parts.capacity * values[: parts.count - 1].sum())
    if cap is not None and not spare and weight_EE.sum() > 0:
        roots = [np.sqrt(np.maximum(weight_EE.sum(axis=axis), 1e-300)) for axis in (1, 0)]
        values = np.linalg.svd(weight_EE / roots[0][:, None] / roots[1], compute_uv=False)
        bounds.append(weight_EE.sum() * cap / parts.count * _first(values, parts.count / cap))
    return float(min(bounds)) + SAFETY


def best_partners(gain_EE: np.ndarray, width: int, spare: int) -> float:
    """Sum over experts of their `width` best partners, and of the `spare` best further sets of so many."""
    if width < 1:
        return 0.0
    falling_EE = np.sort(gain_EE, axis=1)[:, ::-1]
    sums_EB = np.add.reduceat(falling_EE, np.arange(0, falling_EE.shape[1], width), axis=1)
    further = np.sort(sums_EB[:, 1:].ravel())[::-1]
    return float(sums_EB[:, 0].sum() + further[:spare].sum())


def least_imbalance(load_E: np.ndarray, slots_R: np.ndarray, speed_R: np.ndarray, *, whole: bool) -> float:
    """Least busiest rank over the mean, for loads of one layer: j experts are served by few ranks; or share them."""
    experts, ranks, total = len(load_E), len(slots_R), float(load_E.sum())
    if not total:
        return 1.0
    falling, fast = np.sort(load_E)[::-1], np.sort(speed_R)[::-1]
    spare = max(int(slots_R.sum()) - experts, 0)
    slowest = max(falling[: j + 1].sum() / fast[: min(ranks, spare + j + 1)].sum() for j in range(experts))
    if int(slots_R.sum()) == experts and (speed_R == speed_R[0]).all():
        fair = total / ranks
        busiest = float(np.ceil(fair - 1e-9)) if whole else fair
        rising = falling[::-1]
        for j in range((experts - 1) // ranks + 1):
            light = rising[: max(int(slots_R.min()) - 1 - j, 0)].sum()
            busiest = max(busiest, float(falling[j * ranks - j : j * ranks + 1].sum() + light))
        slowest = max(slowest, busiest / speed_R[0])
    return max(float(slowest) * speed_R.sum() / total, 1.0)


def _centred(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    return np.asarray(matrix - rows - columns + matrix.mean())


def _orthogonal_to_ones(centred_EE: np.ndarray) -> np.ndarray:
    """Falling eigenvalues of a doubly centred matrix, without the one of the vector of ones."""
    size = len(centred_EE)
    basis = np.linalg.qr(np.column_stack([np.ones(size), np.eye(size)[:, 1:]]))[0][:, 1:]
    return np.asarray(np.linalg.eigvalsh(basis.T @ centred_EE @ basis)[::-1])


def _first(falling: np.ndarray, number: float) -> float:
    """Sum of the first `number` values, the last one in part."""
    weight = np.clip(number - np.arange(len(falling)), 0.0, 1.0)
    return float(weight @ falling)
