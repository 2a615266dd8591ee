"""Semidefinite relaxation of a partition into equal parts: what layouts satisfy, and the bound of any multiplier.

A layout of n experts (of one layer, or of several consecutive layers side by side) on P parts is the matrix
Z = sum over parts of z z', z the 0/1 indicator of a part: Z_ef = 1 if e and f share a part. Its properties:

    rows      Z_ee = 1, 0 <= Z <= 1, and each row has C ones in every layer (at most C where parts differ)
    spectrum  all parts C: Z = 11'/P + (w C) times a projector of rank P - 1, orthogonal to layer indicators;
              any sizes: 0 <= Z <= w C I, trace n
    load      sum over parts of (load - mean)^2 = p'Z p <= eps, p the centred loads, where a cap limits the loads

Minimise a convex F over such Z. For any symmetric H, any mu >= 0 and any affine minorant F(Z) >= a - <G, Z>,

    F  >=  a + min over rows of <H - G, Z> - max over spectrum of <H - sum mu p p', Z> - sum mu eps

because <H, Z> cancels. Both inner problems are solved exactly (sort each row; sum of largest eigenvalues), so the right
side is a proven bound for any (H, mu, G). ADMM between the two sets drives it up (`dual`): H = rho U, its scaled
multiplier, and G a slope of F. Source: the semidefinite relaxations of graph equipartition (Donath, Hoffman
1973; Karisch, Rendl 1998), solved by ADMM (Wen, Goldfarb, Yin 2010), with the connectivity convexified expert by
expert (`connectivity_slope`).

Shape letters: E experts per layer, w layers side by side, n = w E, P parts, C capacity, U distinct k-sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.placement.bounds.ksets import UNIT, set_lines, set_pieces
from moeplace.profiling.kernel_cache import njit

Slope = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Z (n, n) -> (a, G): F(Z') >= a - <G, Z'> for all Z', with equality at Z; G symmetric and non-negative."""

STEP = 16.0
"""rho over the root mean square of the first slope."""


@dataclass(frozen=True)
class Layout:
    """What every layout satisfies.

    Attributes:
        layers: w, layers side by side.
        experts: E, experts of each.
        parts: P.
        capacity: C, (most) experts of a layer on a part.
        exact: every part holds exactly C experts of each layer.
        loads: (p, eps) for each load that is held down: p (n,) centred if exact, p'Zp <= eps.
        spare: redundant slots of all layers together, for several layers side by side (`replicated` has one layer). Z
            is then the layout of one copy of each expert, and each further copy adds at most its best C partners in
            each neighbouring layer to <G, Z>.
    """

    layers: int
    experts: int
    parts: int
    capacity: int
    exact: bool
    loads: Sequence[tuple[np.ndarray, float]] = ()
    spare: int = 0

    @property
    def size(self) -> int:
        return self.layers * self.experts

    @property
    def top(self) -> float:
        """Largest eigenvalue that a layout can have."""
        return float(self.layers * self.capacity)


def penalty(layout: Layout, mu: np.ndarray) -> np.ndarray | float:
    """sum of mu p p'."""
    return sum((m * np.outer(p, p) for m, (p, _) in zip(mu, layout.loads, strict=True) if m), 0.0)


def _centre(layout: Layout, matrix: np.ndarray) -> np.ndarray:
    """The matrix restricted to vectors that sum to zero in every layer."""
    w, e = layout.layers, layout.experts
    blocks = matrix.reshape(w, e, w, e)
    blocks = blocks - blocks.mean(axis=1, keepdims=True)
    return (blocks - blocks.mean(axis=3, keepdims=True)).reshape(matrix.shape)


def _layer_projector(layout: Layout) -> np.ndarray:
    """Projector onto the span of the layers' indicators."""
    return np.kron(np.eye(layout.layers), np.full((layout.experts, layout.experts), 1.0 / layout.experts))


def to_spectrum(layout: Layout, matrix: np.ndarray) -> np.ndarray:
    """Nearest matrix with the spectrum of a layout (the convex hull of the possible spectra)."""
    matrix = (matrix + matrix.T) / 2
    if not layout.exact:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * _cap_to_sum(values, layout.top, float(layout.size))) @ vectors.T
    shift = 10.0 * (np.abs(matrix).sum(axis=1).max() + 1.0)
    values, vectors = np.linalg.eigh(_centre(layout, matrix) - shift * _layer_projector(layout))
    values, vectors = values[layout.layers :], vectors[:, layout.layers :]  # the rest spans the layers' indicators
    values = _cap_to_sum(values, layout.top, layout.top * (layout.parts - 1))
    return (vectors * values) @ vectors.T + 1.0 / layout.parts


def _cap_to_sum(values: np.ndarray, top: float, total: float) -> np.ndarray:
    """Nearest vector with entries in [0, top] and the given sum: clip(values - tau)."""
    low, high = float(values.min()) - top, float(values.max())
    for _ in range(50):
        tau = (low + high) / 2
        if np.clip(values - tau, 0.0, top).sum() > total:
            low = tau
        else:
            high = tau
    return np.clip(values - (low + high) / 2, 0.0, top)


def certify(layout: Layout, constant: float, gain: np.ndarray, h: np.ndarray, mu: np.ndarray) -> float:
    """The bound of the module's docstring for one (H, mu, G)."""
    h = (h + h.T) / 2
    price = sum(m * eps for m, (_, eps) in zip(mu, layout.loads, strict=True))
    inner = _least_rows(layout, h - gain) - _most_spectrum(layout, h - penalty(layout, mu))
    return constant + inner - float(price) - _most_extra(layout, gain)


def _most_extra(layout: Layout, gain: np.ndarray) -> float:
    """Most that the copies in spare slots add to <gain, Z>: an expert's copies take disjoint sets of partners."""
    width = layout.capacity * min(layout.layers - 1, 2)
    if not layout.spare or not width:
        return 0.0
    falling = -np.sort(-2 * gain, axis=1)
    blocks = np.add.reduceat(falling, np.arange(0, layout.size, width), axis=1)
    return float(np.sort(blocks, axis=None)[::-1][: layout.spare].sum())


def _least_rows(layout: Layout, cost: np.ndarray) -> float:
    """Exact minimum of <cost, Z> over the row conditions."""
    w, e = layout.layers, layout.experts
    diagonal = float(np.trace(cost))
    off = cost.copy()
    np.fill_diagonal(off, np.inf)
    total = diagonal
    for index in range(w):
        for other in range(w):
            block = off[index * e : (index + 1) * e, other * e : (other + 1) * e]
            count = min(layout.capacity - 1, e - 1) if index == other else min(layout.capacity, e)
            least = np.sort(block, axis=1)[:, :count]
            total += float((least if layout.exact else np.minimum(least, 0.0)).sum())
    return total


def _most_spectrum(layout: Layout, h: np.ndarray) -> float:
    """Exact maximum of <h, Z> over the spectral conditions."""
    if not layout.exact:
        values = np.linalg.eigvalsh(h)[::-1]
        count = layout.size / layout.top
        whole = min(int(count), len(values))
        rest = (count - whole) * values[whole] if whole < len(values) else 0.0
        return layout.top * float(values[:whole].sum() + rest)
    shift = 10.0 * (np.abs(h).sum(axis=1).max() + 1.0)
    values = np.linalg.eigvalsh(_centre(layout, h) - shift * _layer_projector(layout))[::-1]
    return float(h.sum()) / layout.parts + layout.top * float(values[: layout.parts - 1].sum())


def connectivity_slope(sets_UK: np.ndarray, share_U: np.ndarray, experts: int, capacity: int) -> Slope:
    """F = mean d of a layer, convexified: sum over tokens and their experts of phi(1 + sum of Z_ef over its others).

    d of a token is the sum over its experts of 1 / (its experts on that one's part). phi is the convex, piecewise
    linear function through (n, 1/n), so F is exact for layouts and each piece, chosen by token and expert, is a
    minorant.

    Args:
        sets_UK: (U, K) int64 distinct k-sets, -1 = none.
        share_U: (U,) weight of each.
        experts: E.
        capacity: C; no more than C experts of a token are on a part.
    """
    most = max(min(sets_UK.shape[1], capacity), 2)

    def slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        gain = np.zeros((experts, experts))
        constant = _connectivity_pieces(sets_UK, share_U, z, most, gain)
        return constant, (gain + gain.T) / 2

    return slope


def kset_slope(sets_UK: np.ndarray, share_U: np.ndarray, experts: int, capacity: int) -> Slope:
    """F = mean d of a layer, convexified token by token: the best minorant of each k-set's subsets (`ksets`).

    Tighter than `connectivity_slope`, for k-sets of up to `LARGEST_SET` experts; same arguments.
    """
    lines, number = set_lines(sets_UK.shape[1], capacity)

    def slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        gain = np.zeros((experts, experts))
        return float(set_pieces(sets_UK, share_U, np.rint(UNIT * z).astype(np.int64), lines, number, gain)), gain

    return slope


def linear_slope(weights: Sequence[np.ndarray]) -> Slope:
    """F = - sum of stayed tokens over the boundaries of consecutive layers, weights (E, E) each."""
    w, e = len(weights) + 1, len(weights[0])
    gain = np.zeros((w * e, w * e))
    for index, weight_EE in enumerate(weights):
        here, there = slice(index * e, (index + 1) * e), slice((index + 1) * e, (index + 2) * e)
        gain[here, there] = weight_EE / 2
        gain[there, here] = weight_EE.T / 2
    return lambda z: (0.0, gain)


@njit(cache=True, nogil=True)
def _connectivity_pieces(sets_UK, share_U, z, most, gain):  # type: ignore[no-untyped-def]
    constant = 0.0
    top_k = sets_UK.shape[1]
    for u in range(len(sets_UK)):
        for a in range(top_k):
            e = sets_UK[u, a]
            if e < 0:
                continue
            together = 1.0
            for b in range(top_k):
                f = sets_UK[u, b]
                if f >= 0 and f != e:
                    together += z[e, f]
            n = min(max(int(np.floor(together)), 1), most - 1)
            fall = 1.0 / (n * (n + 1))  # the piece from (n, 1/n) to (n+1, 1/(n+1))
            constant += share_U[u] * (1.0 / n + (n - 1) * fall)
            for b in range(top_k):
                f = sets_UK[u, b]
                if f >= 0 and f != e:
                    gain[e, f] += share_U[u] * fall
    return constant


def load_spread(cap_share: float, parts: int, total: float, *, exact: bool) -> float:
    """eps: most sum over parts of (load - mean)^2 (exact) or load^2, if no part has more than `cap_share` of the mean.

    With x = cap - 1 >= 0 and loads that sum to `total`: sum (load - mean)^2 <= min(P (P-1) x^2, P x) mean^2, the first
    reached with all parts but one at the cap, the second because sum load^2 <= cap sum load.
    """
    mean, excess = total / parts, max(cap_share - 1.0, 0.0)
    spread = min(parts * (parts - 1) * excess**2, parts * excess) * mean**2
    return float(spread if exact else spread + parts * mean**2)
