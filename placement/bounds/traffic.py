"""Closed-form bounds on traffic: stayed tokens of a layer boundary, ranks per token of a layer.

"Parts" are ranks, or nodes with all their ranks' slots. Where no replicas are possible (S = E) and all parts have C
slots, every part holds exactly C experts; where parts differ, C is the largest and only the bounds marked "any sizes"
hold. W = transitions of a boundary, c = co-activation, M (T, E) = 0/1 membership, P = load, Q = I - 11'/E, topm = sum
of the m largest, sigma and lambda = singular and eigenvalues, falling. kappa caps every part's share of the load:
kappa / parts.

Shape letters: T tokens, E experts, K top-k, U distinct k-sets.
"""

import numpy as np

from moeplace.profiling.traces.kernels import count_coactivation
from moeplace.profiling.traces.stats import distinct_ksets


def stay_by_rows(weight_EE: np.ndarray, capacity: int, spare: int = 0) -> float:
    """Most stayed tokens, any sizes: each expert keeps at most its C best partners in the other layer.

    min over both directions of sum over rows of topC(row). With `spare` redundant slots, each of them gives one
    expert C more partners at most: the largest such gains are added.
    """
    sides = []
    for matrix in (weight_EE, weight_EE.T):
        falling = -np.sort(-matrix, axis=1)
        sides.append(_blocks_by_gain(falling, capacity, spare))
    return float(min(sides))


def stay_by_spectrum(weight_EE: np.ndarray, parts: int, capacity: int) -> float:
    """Most stayed tokens, parts of exactly C experts: tot/parts + C sum_{i<parts} sigma_i(Q W Q).

    Part indicators are 1/parts plus a rest orthogonal to 1 with singular values sqrt(C); von Neumann's trace
    inequality.
    """
    centred = weight_EE - weight_EE.mean(axis=0) - weight_EE.mean(axis=1)[:, None] + weight_EE.mean()
    sigma = np.linalg.svd(centred, compute_uv=False)
    return float(weight_EE.sum() / parts + capacity * sigma[: parts - 1].sum())


def stay_by_load(weight_EE: np.ndarray, parts: int, kappa: float) -> float:
    """Most stayed tokens, any sizes, no part with more than kappa tot/parts primary tokens in either layer.

    tot (kappa/parts) sum_{i <= parts/kappa} sigma_i(Dr^-1/2 W Dc^-1/2), last term fractional; Dr, Dc row and column
    sums.
    """
    total = weight_EE.sum()
    if not total:
        return 0.0
    scale_r, scale_c = (1 / np.sqrt(np.maximum(weight_EE.sum(axis=axis), 1e-300)) for axis in (1, 0))
    normal = weight_EE * np.where(weight_EE > 0, scale_r[:, None] * scale_c, 0.0)
    sigma = np.linalg.svd(normal, compute_uv=False)
    return float(total * kappa / parts * fractional_sum(sigma, parts / kappa))


def ranks_per_token(
    ids_TK: np.ndarray, num_experts: int, parts: int, capacity: int, *, spare: int = 0, exact: bool, kappa: float | None
) -> float:
    """Lower bound on the mean d of a layer: the best of the floor, psi(q) and phi, by classes of equal k.

    Args:
        ids_TK: (T, K) expert ids, -1 = none.
        num_experts: E.
        parts: number of ranks (or nodes).
        capacity: C, most slots of a part.
        spare: redundant slots, S - E.
        exact: every part holds exactly C experts and there are no replicas.
        kappa: cap on every part's share of the layer's load, None = none or replicas are possible.
    """
    tokens, k_T = len(ids_TK), (ids_TK >= 0).sum(axis=1)
    total = 0.0
    for k in np.unique(k_T[k_T > 0]):
        class_TK = ids_TK[k_T == k]
        bounds = [float(-(-k // capacity))]
        if k > 1 and capacity > 1:
            pairs_EE = coactivation(class_TK, num_experts)
            load_E = np.bincount(class_TK[class_TK >= 0], minlength=num_experts).astype(float)
            share = kappa if len(class_TK) == tokens else None  # the cap is on the whole layer's load
            squares = most_squares(pairs_EE, load_E, len(class_TK), parts, capacity, spare, exact, share)
            bounds.append(psi(squares, int(k), parts, capacity))
            if not spare:
                bounds.append(phi_bound(pairs_EE, load_E, int(k), capacity) / len(class_TK))
        total += max(bounds) * len(class_TK)
    return total / tokens if tokens else 0.0


def most_squares(
    pairs_EE: np.ndarray,
    load_E: np.ndarray,
    tokens: int,
    parts: int,
    capacity: int,
    spare: int,
    exact: bool,
    kappa: float | None,
) -> float:
    """q: upper bound on the mean over tokens of sum over parts of (experts of the token on the part)^2; the least of

    rows      K + (1/T) sum_e topC-1(c(e,.)), plus the largest gains of C - 1 partners per redundant slot; any sizes
    spectrum  K + (1/T) (sum c / parts + C sum_{i<parts} lambda_i(Q c Q)); exact sizes
    load      (kappa K / parts) sum_{i <= parts/kappa} lambda_i(D^-1/2 M'M D^-1/2), D = diag(P); any sizes, no replicas
    """
    per_token = load_E.sum() / tokens
    bounds = [per_token + _blocks_by_gain(-np.sort(-pairs_EE, axis=1), capacity - 1, spare) / tokens]
    if exact:
        centred = pairs_EE - pairs_EE.mean(axis=0) - pairs_EE.mean(axis=1)[:, None] + pairs_EE.mean()
        eigen = _complement_spectrum(centred)
        bounds.append(per_token + (pairs_EE.sum() / parts + capacity * eigen[: parts - 1].sum()) / tokens)
    if kappa is not None and not spare:
        scale = 1 / np.sqrt(np.maximum(load_E, 1e-300)) * (load_E > 0)
        eigen = np.linalg.eigvalsh((pairs_EE + np.diag(load_E)) * np.outer(scale, scale))[::-1]
        bounds.append(kappa * per_token / parts * fractional_sum(np.maximum(eigen, 0.0), parts / kappa))
    return min(bounds)


def psi(squares: float, top_k: int, parts: int, capacity: int) -> float:
    """Least mean d when the mean of sum n^2 is at most `squares`: lower hull of the even splits of K into j parts."""
    counts = np.arange(-(-top_k // capacity), min(top_k, parts) + 1)[::-1]
    small, rest = top_k // counts, top_k % counts
    even = rest * (small + 1) ** 2 + (counts - rest) * small**2
    return float(np.interp(squares, even, counts))


def phi_bound(pairs_EE: np.ndarray, load_E: np.ndarray, top_k: int, capacity: int) -> float:
    """Least sum of d over tokens, any sizes: sum_e P_e phi(1 + topC-1(c(e,.)) / P_e), phi through (n, 1/n)."""
    top_E = -np.sort(-pairs_EE, axis=1)[:, : capacity - 1].sum(axis=1)
    used = load_E > 0
    n = np.arange(1, min(top_k, capacity) + 1)
    return float((load_E[used] * np.interp(1 + top_E[used] / load_E[used], n, 1 / n)).sum())


def coactivation(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """(E, E) float64 tokens that two experts serve together, zero diagonal."""
    counts = np.zeros((1, num_experts, num_experts), np.int64)
    count_coactivation(ids_TK[:, None, :], np.array([num_experts]), counts)
    return counts[0].astype(float)


def ksets_of(ids_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct k-sets (U, K) int64 and the share of tokens that has each, (U,) float64."""
    sets_UK, count_U = distinct_ksets(ids_TK)
    return sets_UK.astype(np.int64), count_U / max(len(ids_TK), 1)


def fractional_sum(falling: np.ndarray, count: float) -> float:
    """Sum of the first `count` entries, the last one in part."""
    whole = min(int(count), len(falling))
    rest = falling[whole] * (count - whole) if whole < len(falling) else 0.0
    return float(falling[:whole].sum() + rest)


def _blocks_by_gain(falling_EE: np.ndarray, width: int, spare: int) -> float:
    """Sum of the first `width` of each row, and of the `spare` best further blocks of `width` over all rows."""
    if width <= 0:
        return 0.0
    experts = falling_EE.shape[1]
    blocks = -(-experts // width)
    padded = np.pad(falling_EE, ((0, 0), (0, blocks * width - experts)))
    gains = padded.reshape(len(falling_EE), blocks, width).sum(axis=2)
    extra = np.sort(gains[:, 1:], axis=None)[::-1][:spare].sum()
    return float(gains[:, 0].sum() + extra)


def _complement_spectrum(centred_EE: np.ndarray) -> np.ndarray:
    """Eigenvalues, falling, of a doubly centred symmetric matrix on the space orthogonal to 1."""
    size = len(centred_EE)
    shift = np.abs(centred_EE).sum() + 1.0
    return np.linalg.eigvalsh(centred_EE - shift / size)[::-1][: size - 1]
