"""The dual of the relaxation, driven up by ADMM, and the point of it that is written into a certificate.

While F is curved its slope jumps from piece to piece, and the multiplier never settles: the bound it gives lags behind
the relaxation's optimum by as much as two per cent. So the iteration has two parts. In the first G follows the slope;
minorants are collected on the way. Their mean is a minorant too, near the best one; with it, F is linear, and in the
second part the multiplier converges to what that minorant can prove.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.placement.bounds.relaxation import STEP, Layout, Slope, certify, penalty, to_spectrum

CURVED_SHARE = 0.6
"""Of the iterations, in which G follows the slope."""
MINORANTS = 6
"""Collected in the second half of those; each is 2 KB of a certificate at 64 experts."""
_MULTIPLES = (0.7, 0.85, 1.0, 1.2, 1.4)


@dataclass(frozen=True, eq=False)
class Dual:
    """A point from which the bound follows by `certify` alone, in the precision in which it is written down.

    Attributes:
        bound: what it proves.
        z: (n, n) uint8 each, G is the mean of the slopes at `as_read(z)`.
        h: (n, n) int16 symmetric, `scale` of H.
        scale: H = scale h.
        mu: multiplier of each load.
    """

    bound: float
    z: Sequence[np.ndarray]
    h: np.ndarray
    scale: float
    mu: np.ndarray


def solve_dual(
    layout: Layout, slope: Slope, *, iterations: int, curved: bool = True, deadline: float = float("inf")
) -> Dual:
    """The best lower bound on F over all layouts that was found, with what proves it.

    Args:
        layout: the set of layouts.
        slope: affine minorants of F.
        iterations: ADMM steps; a few dozen come close to the relaxation's optimum.
        curved: whether F is; a linear one has one slope.
        deadline: reading of `time.monotonic` at which the iteration ends.
    """
    state = _State(layout, slope, curved)
    first = int(iterations * CURVED_SHARE) if curved else 0
    every = max(first // (2 * MINORANTS), 1)
    for step in range(1, iterations + 1):
        if time.monotonic() > deadline:
            break
        state.step()
        if step < first and step > first - every * MINORANTS and (first - step) % every == 0:
            state.collect()
        if step == first:
            state.freeze()
        if step > first and (step - first) % max((iterations - first) // 3, 1) == 0:
            state.keep_best()
    if state.curved:
        state.freeze()
    state.keep_best()
    return state.best


class _State:
    """z and y, the two copies of the layout; u, the scaled multiplier; mu, the prices of loads; G as it is."""

    def __init__(self, layout: Layout, slope: Slope, curved: bool) -> None:
        self.layout, self.slope, self.curved = layout, slope, curved
        start = min((layout.capacity - 1) / max(layout.experts - 1, 1), 1.0)
        self.z = np.full((layout.size, layout.size), start)
        np.fill_diagonal(self.z, 1.0)
        self.u, self.mu = np.zeros_like(self.z), np.zeros(len(layout.loads))
        # Further copies bring more partners than Z shows.
        self.inflate = 1.0 + min(6.0 * layout.spare / layout.size, 1.0)
        self.minorants = [_rounded(self.z)]
        self.constant, self.gain = slope(as_read(self.minorants[0]))
        self.rho = STEP * float(np.sqrt((self.gain**2).mean())) or 1.0
        self.best = self._dual(np.zeros(len(layout.loads)))
        self.collected: list[np.ndarray] = []

    def step(self) -> None:
        """One step of ADMM; the proximal term holds a curved F back."""
        smooth = 1.0 if self.curved else 0.0
        y = to_spectrum(self.layout, self.z + self.u - penalty(self.layout, self.mu / self.rho))
        for index, (p, eps) in enumerate(self.layout.loads):
            scale = float(p @ p)
            self.mu[index] = max(self.mu[index] + 0.3 * self.rho / scale * ((p @ y @ p - eps) / scale), 0.0)
        self.z = np.clip((y - self.u + smooth * self.z + self.gain / self.rho) / (1 + smooth), 0.0, 1.0)
        np.fill_diagonal(self.z, 1.0)
        self.u += self.z - y
        if self.curved:
            self.constant, self.gain = self.slope(np.minimum(self.z * self.inflate, 1.0))

    def collect(self) -> None:
        """Remember the present minorant."""
        self.collected.append(_rounded(np.minimum(self.z * self.inflate, 1.0)))

    def freeze(self) -> None:
        """From now on F is the mean of the minorants collected, the present one among them."""
        self.collect()
        self.minorants = self.collected
        slopes = [self.slope(as_read(z)) for z in self.minorants]
        self.constant = float(np.mean([constant for constant, _ in slopes]))
        self.gain = np.mean([gain for _, gain in slopes], axis=0)
        self.curved = False

    def keep_best(self) -> None:
        """Take the present point if it proves more."""
        for multiple in _MULTIPLES if self.mu.any() else (1.0,):
            found = self._dual(multiple * self.mu)
            if found.bound > self.best.bound:
                self.best = found

    def _dual(self, mu: np.ndarray) -> Dual:
        h = self.rho * (self.u + self.u.T) / 2
        scale = float(np.abs(h).max()) / 32767.0 or 1.0
        h_16 = np.rint(h / scale).astype(np.int16)
        bound = certify(self.layout, self.constant, self.gain, h_16 * scale, mu)
        return Dual(bound, tuple(self.minorants), h_16, scale, mu.copy())


def as_read(z_8: np.ndarray) -> np.ndarray:
    """The matrix that a written one stands for: (z + 1/64) / 255.

    Sums of less than 64 entries of it stay off whole numbers, where the slope changes its piece: whoever reads it picks
    the same pieces, in whatever order entries are added.
    """
    return np.asarray((z_8 + 1 / 64) / 255.0)


def _rounded(z: np.ndarray) -> np.ndarray:
    return np.rint(255.0 * z).astype(np.uint8)
