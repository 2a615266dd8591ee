"""Certificates for layers whose experts may have several slots.

x_r in {0, 1}^E says what part r holds, M = sum x_r x_r', c = diag M = slots of experts. A token finds e and f together
at most B_ef = min(M_ef, 1). For any symmetric K and any v, with H = K - (v1' + 1v') / 2:

    <G, B> = <G - H, B> - <H, M - B> + <K, M> - v'M 1 - sum H_ee c_e     (first two: off the diagonal)

* <K, M> <= C sum c_e Q_ee, Q the positive part of K: y'My = sum_r (sum of y on r)^2 <= C sum_e c_e y_e^2.
* M 1 = C c if every part holds C experts, C at most E. A part may be filled up, which only brings more together. Where
  parts differ M 1 <= C c, and v must not be positive.
* Row e has (C - 1) c_e seats: a partner e meets for the first time is worth (G - H)_ef, again -H_ef; none is met again
  if c_e = 1.

Shape letters: E experts.
"""

from typing import Any

import numpy as np

from moeplace.placement.verification.closed_forms import SAFETY, Parts
from moeplace.placement.verification.relaxed import unpack
from moeplace.placement.verification.statement import UNREADABLE, what_is_wrong
from moeplace.profiling.errors import FormatError


def certified_copies(document: Any, parts: Parts, experts: int, spare: int, pieces: tuple[float, np.ndarray]) -> float:
    """The bound on mean parts per token that a certificate proves.

    Args:
        document: `h` (K), `h_scale`, `seats` (v) as the file has them.
        parts: the parts.
        experts: E.
        spare: redundant slots.
        pieces: (a, G (E, E)).

    Raises:
        FormatError: the certificate cannot be read.
    """
    try:
        k = unpack(document["h"], experts, "<i2") * float(document["h_scale"])
        v = np.array([float(value) for value in document["seats"]])
        if v.shape != (experts,):
            raise ValueError(f"{len(v)} seats, {experts} expected")
    except UNREADABLE as error:
        raise FormatError(f"a certificate cannot be read: {what_is_wrong(error)}") from error
    if not (np.isfinite(k).all() and np.isfinite(v).all() and np.abs(k).max() < 1e150 and np.abs(v).max() < 1e150):
        raise FormatError("a certificate has a number beyond all bounds")
    constant, gain = pieces
    return constant - most_together(gain, k, v, parts, spare) - SAFETY


def most_together(gain: np.ndarray, k: np.ndarray, v: np.ndarray, parts: Parts, spare: int) -> float:
    """Most <G, B> over all layouts with `spare` redundant slots.

    Args:
        gain: (E, E) G, symmetric, not negative.
        k: (E, E) symmetric K.
        v: (E,) multipliers.
        parts: the parts.
        spare: slots beyond one per expert.
    """
    experts = len(gain)
    capacity = min(parts.capacity, experts)  # no part holds an expert twice
    if parts.even:
        spare = parts.count * capacity - experts
    v = v if parts.even else np.minimum(v, 0.0)
    h = k - np.add.outer(v, v) / 2
    values, vectors = np.linalg.eigh(k)
    positive = np.einsum("ei,i,ei->e", vectors, values.clip(min=0.0), vectors)
    slot_E = capacity * positive - capacity * v - np.diag(h)
    total, increments = 0.0, []
    for e in range(experts):
        new = np.delete(gain[e] - h[e], e)
        again = float(np.delete(-h[e], e).max())
        new = np.sort(new)[::-1]
        if not parts.even:
            new, again = new.clip(min=0.0), max(again, 0.0)
        worth = float(new[: capacity - 1].sum()) + slot_E[e]
        total += worth
        for count in range(2, min(parts.count, spare + 1) + 1):
            seats = (capacity - 1) * count
            filled = np.maximum(new[:seats], again).sum() + max(seats - len(new), 0) * again + count * slot_E[e]
            increments.append(float(filled - worth))
            worth = float(filled)
    best = np.sort(increments)[::-1][:spare]
    return total + float(best.sum() if parts.even else best.clip(min=0.0).sum())
