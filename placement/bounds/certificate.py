"""What proves a bound, as plain data for the placement file: `placement.verification` checks it without this room.

Closed forms need no certificate, everybody can compute them again. The relaxation does: the point of the dual that its
iteration ended at (`dual.Dual`).
"""

import base64
import zlib
from typing import Any

import numpy as np

from moeplace.placement.bounds.dual import Dual

FORMAT = "moeplace.certificate/1"
Proof = dict[str, Any]


def proof_of(dual: Dual, kind: str, *, nodes: bool, first: int, layers: int, pieces: str = "") -> Proof:
    """One bound of the relaxation.

    Args:
        dual: the point.
        kind: "connectivity", parts per token of a layer, or "stay", stayed tokens of a window of layers.
        nodes: parts are nodes, else ranks.
        first, layers: the layers it is about.
        pieces: which minorants z picks from: those of "subsets" of k-sets, or of the "inverse" of experts that meet.
    """
    proof = {"kind": kind, "nodes": nodes, "first": first, "layers": layers, "h": pack(dual.h), "h_scale": dual.scale,
             "mu": dual.mu.tolist()}  # fmt: skip
    if dual.seats is not None:
        proof["seats"] = dual.seats.tolist()
    return {**proof, "z": [pack(z) for z in dual.z], "pieces": pieces} if kind == "connectivity" else proof


def certificate(proofs: list[Proof], *, by_search: bool) -> dict[str, Any]:
    """The entry `certificate` of a placement file.

    Args:
        proofs: of the relaxation; what they leave is closed forms.
        by_search: the stated bound is the solver's own, by exhaustive search, which nothing here can check.
    """
    return {"format": FORMAT, "by_search": by_search, "proofs": proofs}


def pack(matrix: np.ndarray) -> str:
    """The upper triangle of a symmetric matrix of small integers, deflated, in base64; little-endian."""
    flat = matrix[np.triu_indices(len(matrix))]
    return base64.b64encode(zlib.compress(flat.astype(flat.dtype.newbyteorder("<")).tobytes(), 9)).decode()
