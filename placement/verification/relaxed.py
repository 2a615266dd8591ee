"""Certificates of the semidefinite relaxation: matrices from the file, inequalities checked here.

For layouts Z (Z_ef = 1 if e and f share a part), any symmetric H, any mu, t >= 0 and any minorant F(Z) >= a - <G, Z>,

    F >= a - sum t + min over rows of <H - G + sum t A, Z> - max over spectrum of <H - sum mu p p', Z> - sum mu eps

whatever made H, mu, t and G: <A, Z> <= 1 is a triangle inequality Z_ef + Z_eg - Z_fg <= 1 of a partition, p'Zp <= eps
holds under a load cap, and the minima over rows and over spectra are taken exactly. G is chosen piece by piece by a
matrix z of the certificate: any z gives a minorant, and so does the mean of several.
Written as whole numbers it stands for (z + 1/64) / 255, so that sums stay off the whole numbers where pieces meet.

Shape letters: E experts per layer, w layers side by side, n = w E.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.verification.closed_forms import SAFETY, Parts
from moeplace.placement.verification.statement import UNREADABLE, what_is_wrong
from moeplace.profiling.errors import FormatError


@dataclass(frozen=True, eq=False)
class Frame:
    """What layouts of w layers satisfy.

    Attributes:
        parts: the parts.
        experts: E.
        layers: w.
        spare: redundant slots of these layers.
        loads: (p (n,), eps) for each held load.
    """

    parts: Parts
    experts: int
    layers: int
    spare: int
    loads: tuple[tuple[np.ndarray, float], ...]

    @property
    def exact(self) -> bool:
        return self.parts.even and not self.spare


def held_loads(load_wE: np.ndarray, caps_w: np.ndarray | None, parts: Parts, exact: bool, scale: float
               ) -> tuple[tuple[np.ndarray, float], ...]:  # fmt: skip
    """(p, eps) by layer: sum over parts of squared loads (less the mean's, if all parts are equal) is at most eps.

    With x = cap - 1: sum (load - mean)^2 <= min(P (P - 1) x^2, P x) mean^2.
    """
    layers, experts = load_wE.shape
    held = []
    for index in range(layers if caps_w is not None else 0):
        assert caps_w is not None
        load_E = load_wE[index] / scale
        p = np.zeros(layers * experts)
        p[index * experts : (index + 1) * experts] = load_E - load_E.mean() if exact else load_E
        x = max(min(float(caps_w[index]) * parts.fastest, parts.count) - 1.0, 0.0)
        mean = load_E.sum() / parts.count
        spread = min(parts.count * (parts.count - 1) * x**2, parts.count * x) * mean**2
        if (np.abs(p) > SAFETY).any():
            held.append((p, float(spread if exact else spread + parts.count * mean**2)))
    return tuple(held)


def certified(document: Any, frame: Frame, pieces: tuple[float, np.ndarray]) -> float:
    """The bound on F that a certificate proves.

    Args:
        document: `h`, `h_scale`, `mu`, `triangles` as the file has them.
        frame: what is known of layouts.
        pieces: (a, G (n, n)).

    Raises:
        FormatError: the certificate cannot be read.
    """
    size = frame.experts * frame.layers
    try:
        scale = float(document["h_scale"])
        if not np.isfinite(scale):
            raise ValueError(f"h_scale is {scale}")
        h = unpack(document["h"], size, "<i2") * scale
        mu = [float(value) for value in document.get("mu", [])]
        triangles = _triangles(document.get("triangles"), size)
    except UNREADABLE as error:
        raise FormatError(f"a certificate cannot be read: {what_is_wrong(error)}") from error
    if len(mu) != len(frame.loads) or not all(0 <= value < np.inf for value in mu):
        raise FormatError("a certificate has a multiplier below 0, or not one for each load")
    constant, gain = pieces
    cost, paid = h - gain, 0.0
    for (one, two, three), weight in zip(*triangles, strict=True):
        for e, f, sign in ((one, two, 0.5), (one, three, 0.5), (two, three, -0.5)):
            cost[e, f] += sign * weight
            cost[f, e] += sign * weight
        paid += weight
    pulled = h.copy()
    for value, (p, eps) in zip(mu, frame.loads, strict=True):
        pulled -= value * np.outer(p, p)
        paid += value * eps
    if not (np.isfinite(pulled).all() and np.isfinite(cost).all() and np.isfinite(paid)):
        raise FormatError("a certificate has a number beyond all bounds")
    return constant - paid + _rows(frame, cost) - _spectrum(frame, pulled) - _copies(frame, gain) - SAFETY


def connectivity_pieces(sets_UK: np.ndarray, share_U: np.ndarray, z: np.ndarray, capacity: int
                        ) -> tuple[float, np.ndarray]:  # fmt: skip
    """(a, G): mean parts per token >= a - <G, Z>, by the piece of phi that z picks for each expert of a token.

    A token has the sum over its experts of 1 / (its experts on that one's part) parts; phi runs through (n, 1/n).
    """
    member = sets_UK >= 0
    ids_UK = np.where(member, sets_UK, 0)
    pair_UKK = z[ids_UK[:, :, None], ids_UK[:, None, :]] * (member[:, :, None] & member[:, None, :])
    together_UK = pair_UKK.sum(axis=2) - np.einsum("ukk->uk", pair_UKK) + 1.0
    most = max(min(sets_UK.shape[1], capacity), 2)
    n_UK = np.clip(np.floor(together_UK), 1, most - 1)
    fall_UK = member / (n_UK * (n_UK + 1.0))
    constant = float((share_U[:, None] * (member / n_UK + (n_UK - 1.0) * fall_UK)).sum())
    gain = np.zeros(z.shape)
    fall_UKK = np.where(member[:, None, :], (share_U[:, None] * fall_UK)[:, :, None], 0.0)
    first, second = np.broadcast_arrays(ids_UK[:, :, None], ids_UK[:, None, :])
    np.add.at(gain, (first, second), fall_UKK)
    np.fill_diagonal(gain, 0.0)
    return constant, (gain + gain.T) / 2


def stay_pieces(weights: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """(0, G): - (stayed tokens of the boundaries between consecutive layers) = - <G, Z>."""
    layers, experts = len(weights) + 1, len(weights[0])
    gain = np.zeros((layers, experts, layers, experts))
    for index, weight_EE in enumerate(weights):
        gain[index, :, index + 1] = weight_EE / 2
        gain[index + 1, :, index] = weight_EE.T / 2
    return 0.0, gain.reshape((layers * experts,) * 2)


def unpack(text: str, size: int, dtype: str) -> np.ndarray:
    """A symmetric (n, n) matrix from the base64 of its deflated upper triangle.

    Raises:
        ValueError: it is no such text, or of another length.
    """
    try:
        flat = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype)
    except zlib.error as error:
        raise ValueError(f"not deflated: {error}") from error
    if len(flat) != size * (size + 1) // 2:
        raise ValueError(f"{len(flat)} numbers, {size * (size + 1) // 2} expected")
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = flat
    return matrix + np.triu(matrix, 1).T


def _triangles(document: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    if not document:
        return np.zeros((0, 3), np.int64), np.zeros(0)
    triples = np.asarray(document["triples"], dtype=np.int64).reshape(-1, 3)
    weights = np.asarray(document["weights"], dtype=float)
    distinct = (triples[:, [0, 0, 1]] != triples[:, [1, 2, 2]]).all()
    if len(triples) != len(weights) or not distinct or (weights < 0).any() or not np.isin(triples, range(size)).all():
        raise ValueError("triangle inequalities need three experts and a weight from 0")
    return triples, weights


def _rows(frame: Frame, cost: np.ndarray) -> float:
    """Least <cost, Z> if every row has a one for itself and C in each layer, itself included."""
    total, experts, capacity = float(np.trace(cost)), frame.experts, frame.parts.capacity
    for row in range(len(cost)):
        own = row // experts
        for layer in range(frame.layers):
            values = cost[row, layer * experts : (layer + 1) * experts]
            if layer == own:
                values = np.delete(values, row - own * experts)
            least = np.sort(values)[: capacity - (layer == own)]
            total += float(least.sum() if frame.exact else np.minimum(least, 0.0).sum())
    return total


def _spectrum(frame: Frame, matrix: np.ndarray) -> float:
    """Most <matrix, Z> over the spectra that layouts can have."""
    size, experts, layers, parts = len(matrix), frame.experts, frame.layers, frame.parts
    top = float(layers * parts.capacity)
    if not frame.exact:
        values = np.linalg.eigvalsh(matrix)[::-1]
        weight = np.clip(size / top - np.arange(size), 0.0, 1.0)
        return top * float(weight @ values)
    basis = np.linalg.qr(np.column_stack([np.ones(experts), np.eye(experts)[:, 1:]]))[0][:, 1:]
    wide = np.kron(np.eye(layers), basis)  # orthogonal to the indicator of each layer
    values = np.linalg.eigvalsh(wide.T @ matrix @ wide)[::-1]
    return float(matrix.sum()) / parts.count + top * float(values[: parts.count - 1].sum())


def _copies(frame: Frame, gain: np.ndarray) -> float:
    """Most that copies in redundant slots add to <G, Z>, each with C new partners in each neighbouring layer."""
    capacity = frame.parts.capacity
    width = capacity - 1 if frame.layers == 1 else capacity * min(frame.layers - 1, 2)
    if not frame.spare or not width:
        return 0.0
    falling = np.sort(2 * gain, axis=1)[:, ::-1]
    blocks = np.add.reduceat(falling, np.arange(0, len(gain), width), axis=1)
    return float(np.sort(blocks.ravel())[::-1][: frame.spare].sum())
