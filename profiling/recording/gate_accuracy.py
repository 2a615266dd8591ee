"""Cross-layer gate accuracy: how well gate l + 1 predicts its own choice from the input of gate l.

acc@k(l) = mean over tokens of |true K experts of layer l+1 within the k best predicted| / K. It bounds what
prefetching experts one layer ahead can reach without a trained predictor. Shape letters: T tokens, E experts, K top-k.
"""

from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.files import write_json

FORMAT = "moeplace.gate_accuracy/1"


class GateAccuracy:
    """Sums of correct predictions per layer boundary; `add` after every forward pass, `document` at the end.

    Args:
        layer_ids: decoder-layer index of each MoE layer.
        top_k: K.
        num_experts: E.
    """

    def __init__(self, layer_ids: list[int], *, top_k: int, num_experts: int) -> None:
        self.ranks = [k for k in (top_k, 2 * top_k, 4 * top_k) if k <= num_experts]
        self._layer_ids = layer_ids
        self._top_k = top_k
        self._hits = np.zeros((len(layer_ids) - 1, len(self.ranks)))
        self._tokens = np.zeros(len(layer_ids) - 1, dtype=np.int64)

    def add(self, boundary: int, true_TK: np.ndarray, chosen_TK: np.ndarray, scores_TE: np.ndarray) -> None:
        """Count one boundary: the true experts, the predicting gate's own choice and its score of every expert."""
        self._tokens[boundary] += len(true_TK)
        self._hits[boundary, 0] += (true_TK[:, :, None] == chosen_TK[:, None, :]).sum() / self._top_k
        order_TE = np.argsort(-scores_TE, axis=1, kind="stable")[:, : self.ranks[-1]]
        for column, k in enumerate(self.ranks[1:], start=1):
            found = (true_TK[:, :, None] == order_TE[:, None, :k]).sum()
            self._hits[boundary, column] += found / self._top_k

    def document(self, model: str) -> dict[str, Any]:
        """The result as a JSON object: accuracy per boundary and its mean, by k."""
        rates = self._hits / np.maximum(self._tokens, 1)[:, None]
        layers = [
            {
                "from_layer": self._layer_ids[i],
                "to_layer": self._layer_ids[i + 1],
                "accuracy": {str(k): float(rate) for k, rate in zip(self.ranks, rates[i], strict=True)},
            }
            for i in range(len(rates))
        ]
        mean = {str(k): float(r) for k, r in zip(self.ranks, rates.mean(0), strict=True)} if len(rates) else {}
        tokens = int(self._tokens.max(initial=0))
        return {
            "format": FORMAT,
            "model": model,
            "top_k": self._top_k,
            "tokens": tokens,
            "mean": mean,
            "layers": layers,
        }

    def save(self, path: str | Path, model: str) -> None:
        """Write `document` atomically."""
        write_json(path, self.document(model))
