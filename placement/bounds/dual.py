"""The dual of the relaxation, driven up by ADMM, and the point of it that is written into a certificate.

While F is curved its slope jumps from piece to piece, and the multiplier never settles: the bound it gives lags behind
the relaxation's optimum by as much as two per cent. So the iteration has two parts. In the first G follows the slope;
minorants are collected on the way. Their mean is a minorant too, near the best one; with it, F is linear, and in the
second part the multiplier converges to what that minorant can prove.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.placement.bounds.relaxation import STEP, Layout, Slope, certify, penalty, to_spectrum
from moeplace.placement.bounds.replicated import Copies, certify_copies, nearest_rows

CURVED_SHARE = 0.6
"""Of the iterations, in which G follows the slope."""
MINORANTS = 6
"""Collected in the second half of those; each is 2 KB of a certificate at 64 experts."""
_MULTIPLES = (0.7, 0.85, 1.0, 1.2, 1.4)


@dataclass(frozen=True, eq=False)
class Dual:
    """A point from which the bound follows by `certify` or `certify_copies` alone, as precise as it is written down.

    Attributes:
        bound: what it proves.
        z: (n, n) uint8 each, G is the mean of the slopes at `as_read(z)`.
        h: (n, n) int16 symmetric, `scale` of H (of K with redundant slots).
        scale: H = scale h.
        mu: multiplier of each load.
        seats: with redundant slots v, float64 of shape (n,); else None.
    """

    bound: float
    z: Sequence[np.ndarray]
    h: np.ndarray
    scale: float
    mu: np.ndarray
    seats: np.ndarray | None = None


def solve_dual(
    layout: Layout | Copies,
    slope: Slope,
    *,
    iterations: int,
    curved: bool = True,
    deadline: float = float("inf"),
    step: float = STEP,
) -> Dual:
    """The best lower bound on F over all layouts that was found, with what proves it.

    Args:
        layout: the set of layouts.
        slope: affine minorants of F.
        iterations: ADMM steps; a few dozen come close to the relaxation's optimum.
        curved: whether F is; a linear one has one slope.
        deadline: reading of `time.monotonic` at which the iteration ends.
        step: rho over the root mean square of the first slope.
    """
    minorants = _Minorants(slope, curved)
    ascent: _Ascent
    if isinstance(layout, Copies):
        ascent = _CopiesAscent(layout, minorants, step)
    else:
        ascent = _PartitionAscent(layout, minorants, step)
    first = int(iterations * CURVED_SHARE) if curved else 0
    apart = max(first // (2 * MINORANTS), 1) | 1  # odd: the iteration may alternate between two slopes
    for number in range(1, iterations + 1):
        if time.monotonic() > deadline:
            break
        ascent.step()
        if number < first and number > first - apart * MINORANTS and (first - number) % apart == 0:
            minorants.collect()
        if number == first:
            minorants.freeze()
        if number > first and (number - first) % max((iterations - first) // 3, 1) == 0:
            ascent.keep_best()
    if minorants.curved:
        minorants.freeze()
    ascent.keep_best()
    return ascent.best


class _Minorants:
    """The minorant of F that is in force: `constant` - <`gain`, Z>, and those that it is the mean of in the end."""

    def __init__(self, slope: Slope, curved: bool) -> None:
        self.slope, self.curved = slope, curved
        self.constant, self.gain = 0.0, np.zeros((0, 0))
        self.used: list[np.ndarray] = []
        self._collected: list[np.ndarray] = []
        self._at = np.zeros((0, 0))

    def start(self, z: np.ndarray) -> None:
        """Take the one at the first layout."""
        self.used = [_rounded(z)]
        self.constant, self.gain = self.slope(as_read(self.used[0]))

    def follow(self, z: np.ndarray) -> None:
        """Take the one at another layout, if F is curved."""
        self._at = z
        if self.curved:
            self.constant, self.gain = self.slope(z)

    def collect(self) -> None:
        """Remember the present one."""
        self._collected.append(_rounded(self._at))

    def freeze(self) -> None:
        """From now on F is the mean of the minorants collected, the present one among them."""
        if len(self._at):
            self.collect()
            self.used = self._collected
        slopes = [self.slope(as_read(z)) for z in self.used]
        self.constant = float(np.mean([constant for constant, _ in slopes]))
        self.gain = np.mean([gain for _, gain in slopes], axis=0)
        self.curved = False


class _Ascent(ABC):
    """z and y, the two copies of the layout; u, the scaled multiplier; the best dual point so far."""

    best: Dual

    @abstractmethod
    def step(self) -> None:
        """One step of ADMM; the proximal term holds a curved F back."""

    @abstractmethod
    def keep_best(self) -> None:
        """Take the present point if it proves more."""


class _PartitionAscent(_Ascent):
    """Without redundant slots, or with none in the layer itself: mu are the prices of loads."""

    def __init__(self, layout: Layout, minorants: _Minorants, step: float) -> None:
        self.layout, self.minorants = layout, minorants
        start = min((layout.capacity - 1) / max(layout.experts - 1, 1), 1.0)
        self.z = np.full((layout.size, layout.size), start)
        np.fill_diagonal(self.z, 1.0)
        self.u, self.mu = np.zeros_like(self.z), np.zeros(len(layout.loads))
        minorants.start(self.z)
        self.rho = step * float(np.sqrt((minorants.gain**2).mean())) or 1.0
        self.best = self._dual(np.zeros(len(layout.loads)))

    def step(self) -> None:
        smooth = 1.0 if self.minorants.curved else 0.0
        y = to_spectrum(self.layout, self.z + self.u - penalty(self.layout, self.mu / self.rho))
        for index, (p, eps) in enumerate(self.layout.loads):
            scale = float(p @ p)
            self.mu[index] = max(self.mu[index] + 0.3 * self.rho / scale * ((p @ y @ p - eps) / scale), 0.0)
        pulled = y - self.u + smooth * self.z + self.minorants.gain / self.rho
        self.z = np.clip(pulled / (1 + smooth), 0.0, 1.0)
        np.fill_diagonal(self.z, 1.0)
        self.u += self.z - y
        self.minorants.follow(self.z)

    def keep_best(self) -> None:
        for multiple in _MULTIPLES if self.mu.any() else (1.0,):
            found = self._dual(multiple * self.mu)
            if found.bound > self.best.bound:
                self.best = found

    def _dual(self, mu: np.ndarray) -> Dual:
        h_16, scale = _written(self.rho * self.u)
        bound = certify(self.layout, self.minorants.constant, self.minorants.gain, h_16 * scale, mu)
        return Dual(bound, tuple(self.minorants.used), h_16, scale, mu.copy())


class _CopiesAscent(_Ascent):
    """With redundant slots: c are the slots of experts, the diagonal of z; v the prices of rows that are too long."""

    def __init__(self, layout: Copies, minorants: _Minorants, step: float) -> None:
        self.layout, self.minorants = layout, minorants
        n = layout.experts
        self.c = np.full(n, layout.slots / n)
        self.z = np.full((n, n), (layout.capacity - 1) * layout.slots / n / max(n - 1, 1))
        np.fill_diagonal(self.z, self.c)
        self.u, self.below, self.v = np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
        minorants.start(np.minimum(self.z, 1.0))
        self.rho = step * float(np.sqrt((minorants.gain**2).mean())) or 1.0
        self.best = self._dual()

    def step(self) -> None:
        target = self.z + self.u
        target = (target + target.T) / 2
        values, vectors = np.linalg.eigh(target)
        y = (vectors * np.maximum(values, 0.0)) @ vectors.T
        self.below = target - y
        self.z, self.c, self.v = nearest_rows(
            self.layout,
            y - self.u,
            self.z if self.minorants.curved else None,
            self.minorants.gain / self.rho,
            self.c,
            self.v,
        )
        self.u += self.z - y
        self.minorants.follow(np.clip(self.z, 0.0, 1.0))

    def keep_best(self) -> None:
        found = self._dual()
        if found.bound > self.best.bound:
            self.best = found

    def _dual(self) -> Dual:
        k_16, scale = _written(self.rho * self.below)
        seats = -self.rho * self.v
        bound = certify_copies(self.layout, self.minorants.constant, self.minorants.gain, k_16 * scale, seats)
        return Dual(bound, tuple(self.minorants.used), k_16, scale, np.zeros(0), seats)


def _written(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """The symmetric part of a matrix as (int16 of shape (n, n), the scale of one)."""
    matrix = (matrix + matrix.T) / 2
    scale = float(np.abs(matrix).max()) / 32767.0 or 1.0
    return np.rint(matrix / scale).astype(np.int16), scale


def as_read(z_8: np.ndarray) -> np.ndarray:
    """The matrix that a written one stands for: (z + 1/64) / 255.

    Sums of less than 64 entries of it stay off whole numbers, where the slope changes its piece: whoever reads it picks
    the same pieces, in whatever order entries are added.
    """
    return np.asarray((z_8 + 1 / 64) / 255.0)


def _rounded(z: np.ndarray) -> np.ndarray:
    return np.rint(255.0 * np.minimum(z, 1.0)).astype(np.uint8)
