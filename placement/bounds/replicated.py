"""Semidefinite relaxation where experts may have several slots: what layouts satisfy, and the bound of any multiplier.

A layout of n experts with S slots on P parts of (at most) C slots is the matrix M = sum over parts of x x', x the 0/1
indicator of a part: M_ef = parts that e and f share, M_ee = c_e the slots of e. Filled up, every part holds C experts:

    counts    c_e from 1 to P, sum of c = S
    rows      M 1 = C c (<= C c where parts differ), 0 <= M <= min(c_e, c_f)
    spectrum  0 <= M <= C diag(c), by Cauchy and Schwarz in every part

What a token can use is B = min(M, 1) off the diagonal. For any symmetric K, any v (v <= 0 where parts differ) and any
affine minorant F(B) >= a - <G, B>, G >= 0, let H = K - (v1' + 1v') / 2 and Q the positive part of K. Then

    <G, B>  =  <G - H, B> - <H, M - B> + <H, M>         off the diagonal
    <H, M>  =  <K, M> - v'M 1 - sum H_ee c_e  <=  sum c_e (C Q_ee - C v_e - H_ee)

The first two terms are a sum over rows: expert e has (C - 1) c_e seats beside it; each brings a new partner, worth
(G - H)_ef, or one that it has already met, worth -H_ef, and none of the second kind if c_e = 1. The worth of c slots
has falling increments, so the best counts take the S - n largest ones. The right side is a proven bound for any
(K, v, G); ADMM between {M >= 0} and the rest drives it up (`dual`).

Shape letters: n = E experts of a layer, P parts, C capacity, S slots.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NEWTON, _DAMPING = 3, 4.0
"""Steps that make rows as long as they should be, and what is added to the diagonal of their matrices."""
_LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Of a step, tried in turn."""


@dataclass(frozen=True)
class Copies:
    """What every layout of a layer with redundant slots satisfies.

    Attributes:
        experts: E.
        parts: P.
        capacity: C, most slots of a part.
        slots: S.
        exact: every part has C slots.
    """

    experts: int
    parts: int
    capacity: int
    slots: int
    exact: bool

    @property
    def size(self) -> int:
        return self.experts

    @property
    def spare(self) -> int:
        """Slots beyond one for each expert."""
        return self.slots - self.experts

    @property
    def most(self) -> int:
        """Most slots of an expert."""
        return min(self.parts, self.spare + 1)


def certify_copies(layout: Copies, constant: float, gain: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """The bound of the module's docstring for one (K, v, G)."""
    v = v if layout.exact else np.minimum(v, 0.0)
    h = k - (v[:, None] + v[None, :]) / 2
    values, vectors = np.linalg.eigh(k)
    positive = (vectors**2) @ np.maximum(values, 0.0)
    return constant - _most_worth(layout, gain - h, -h, layout.capacity * (positive - v) - np.diag(h))


def _most_worth(layout: Copies, new: np.ndarray, again: np.ndarray, price: np.ndarray) -> float:
    """Most that counts and partners bring: new partners, partners met again, and the price of each slot."""
    beside = layout.capacity - 1
    new, again = new.copy(), again.copy()
    np.fill_diagonal(new, -np.inf)
    np.fill_diagonal(again, -np.inf)
    falling = -np.sort(-new, axis=1)[:, : layout.experts - 1]
    met = again.max(axis=1)
    if not layout.exact:
        falling, met = np.maximum(falling, 0.0), np.maximum(met, 0.0)
    total = float(falling[:, :beside].sum() + price.sum())
    seats = np.full((layout.experts, beside * layout.most), -np.inf)
    shown = min(seats.shape[1], falling.shape[1])
    seats[:, :shown] = falling[:, :shown]
    seats = np.maximum(seats, met[:, None])
    if not layout.spare:
        return total
    blocks = seats.reshape(layout.experts, layout.most, beside).sum(axis=2)
    blocks[:, 1] += blocks[:, 0] - falling[:, :beside].sum(axis=1)  # with a second slot the first one's may repeat
    worth = np.sort((blocks[:, 1:] + price[:, None]).ravel())[::-1][: layout.spare]
    return total + float(worth.sum() if layout.exact else np.maximum(worth, 0.0).sum())


def nearest_rows(
    layout: Copies,
    target: np.ndarray,
    before: np.ndarray | None,
    pull: np.ndarray,
    counts: np.ndarray,
    v: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The layout near `target` that <G, B> pulls on, with counts, rows and entries as they must be: one ADMM step.

    Args:
        layout: the layouts.
        target: (n, n) matrix to come near to.
        before: (n, n) the layout before, to stay near to as well; None = need not.
        pull: (n, n) G / rho.
        counts: (n,) slots of experts before: two experts share no more parts than either has slots.
        v: (n,) multipliers of rows before.

    Returns:
        (n, n) layout, (n,) slots of experts, (n,) multipliers. Rows are as long as they should be up to a Newton step.
    """
    weight = 1.0 if before is None else 2.0
    rows = _Rows(layout, target, target if before is None else (target + before) / 2, weight, pull / weight, counts)
    found = rows.at(v)
    for _ in range(_NEWTON):
        found = rows.shortened(found)
    np.fill_diagonal(found.z, found.c)
    return found.z, found.c, found.v


class _Point(NamedTuple):
    v: np.ndarray
    z: np.ndarray
    c: np.ndarray
    excess: np.ndarray  # (n,) of rows

    @property
    def error(self) -> float:
        return float(self.excess @ self.excess)


class _Rows:
    """Layouts near a target by the prices v of their rows' lengths; see `nearest_rows`."""

    def __init__(self, layout: Copies, target: np.ndarray, mean: np.ndarray, weight: float, pull: np.ndarray,
                 counts: np.ndarray) -> None:  # fmt: skip
        self.layout, self.mean, self.weight, self.pull = layout, mean, weight, pull
        self.wanted, self.beside = np.diag(target).copy(), layout.capacity - 1
        self.shared = np.maximum(np.minimum.outer(counts, counts), 1.0)

    def at(self, v: np.ndarray) -> _Point:
        moved = self.mean - (v[:, None] + v[None, :]) / (2 * self.weight)
        z = np.clip(np.where(moved > 1, moved, np.minimum(moved + self.pull, 1.0)), 0.0, self.shared)
        np.fill_diagonal(z, 0.0)
        c = _to_counts(self.wanted + self.beside * v, self.layout)
        excess = z.sum(axis=1) - self.beside * c
        return _Point(v, z, c, excess if self.layout.exact else np.maximum(excess, -v))

    def shortened(self, point: _Point) -> _Point:
        """One Newton step, shorter where rows only get worse: at their limits counts jump."""
        free = ((point.z > 0) & (point.z < self.shared) & (point.z != 1)) / self.weight
        change = self.beside**2 * _moves_with(point.c, self.layout)
        slope = (np.diag(free.sum(axis=1)) + free) / 2 + change + _DAMPING * np.eye(len(free))
        direction = np.linalg.solve(slope, point.excess)
        best = point
        for length in _LENGTHS:
            v = point.v + length * direction
            tried = self.at(v if self.layout.exact else np.maximum(v, 0.0))
            best = min(best, tried, key=lambda found: found.error)
            if best is not point:
                break
        return best


def _to_counts(wanted: np.ndarray, layout: Copies) -> np.ndarray:
    """Nearest counts from 1 to P that sum to S."""
    bends = np.sort(np.concatenate([wanted - 1.0, wanted - layout.most]))[::-1]
    totals = np.clip(wanted - bends[:, None], 1.0, layout.most).sum(axis=1)
    return np.clip(wanted - np.interp(layout.slots, totals, bends), 1.0, layout.most)


def _moves_with(counts: np.ndarray, layout: Copies) -> np.ndarray:
    """(n, n) derivative of the nearest counts: those that are not at a limit share what changes."""
    free = ((counts > 1 + 1e-12) & (counts < layout.most - 1e-12)).astype(float)
    return np.asarray(np.diag(free) - np.outer(free, free) / max(free.sum(), 1.0))
