"""PrecisionMeter: what each precision of each expert spoils, in one exact pass.

    error[expert, precision] = sum over tokens of (gate weight |exact output - rounded output|)^2
                               / sum over tokens of |output of the layer|^2

An expert that no token chose is not free of error, nobody knows it. So every expert counts one call more, of the mean
error of its layer's calls.

Tokens go through the model exactly; beside it every expert computes its own tokens in all precisions.

Shape letters: L MoE layers, E experts per layer, P precisions, N token rows, K top-k, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from moeplace.runtime.experts.rounding import MATRICES, rounded
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import Activation


class PrecisionMeter:
    """Watches a computation of all experts on one rank; see `ExpertComputation.observer`.

    Attributes:
        spoiled_LEP: float64 sums of squared errors.
        calls_L: (token, expert) pairs so far.
        square_L: sums of squares of what layers put out.
    """

    def __init__(self, store: ExpertStore, slot_to_expert: np.ndarray, precisions: Sequence[str]) -> None:
        """`slot_to_expert`: (L, slots) of the one rank; `precisions`: those to measure, the exact one first."""
        self._store, self._experts, self._precisions = store, slot_to_expert, tuple(precisions)
        layers, experts = len(slot_to_expert), int(slot_to_expert.max()) + 1
        self.spoiled_LEP = np.zeros((layers, experts, len(precisions)))
        self.calls_L, self.square_L = np.zeros(layers), np.zeros(layers)

    @property
    def error_LEP(self) -> np.ndarray:
        """(L, E, P) see the module."""
        one_call_LP = self.spoiled_LEP.sum(axis=1) / np.maximum(self.calls_L, 1)[:, None]
        return (self.spoiled_LEP + one_call_LP[:, None]) / np.maximum(self.square_L, 1e-300)[:, None, None]

    def __call__(
        self, layer: int, x_ND: torch.Tensor, slots_NK: np.ndarray, gate_NK: torch.Tensor, activation: Activation
    ) -> None:
        """One call of a layer's experts."""
        sum_ND = torch.zeros(x_ND.shape, dtype=torch.float64)
        for slot in np.unique(slots_NK[slots_NK >= 0]).tolist():
            row, column = np.nonzero(slots_NK == slot)
            x_MD, gate_M = x_ND[row], gate_NK[row, column].double()[:, None]
            self.calls_L[layer] += len(row)
            parts = self._store.read(layer, slot)
            exact_MD = _apply(parts, x_MD, activation)
            sum_ND.index_add_(0, torch.from_numpy(row), exact_MD * gate_M)
            for p, precision in enumerate(self._precisions[1:], 1):
                off_MD = (_apply(rounded(parts, precision), x_MD, activation) - exact_MD) * gate_M
                self.spoiled_LEP[layer, self._experts[layer, slot], p] += float(off_MD.square().sum())
        self.square_L[layer] += float(sum_ND.square().sum())


def _apply(parts: dict[str, torch.Tensor], x_MD: torch.Tensor, activation: Activation) -> torch.Tensor:
    """(M, D) float64 outputs of one expert."""
    first, second = MATRICES
    hidden = F.linear(x_MD, parts[first], parts.get(f"{first}_bias"))
    return F.linear(activation(hidden), parts[second], parts.get(f"{second}_bias")).double()
