"""LoadWindow: the routing that one rank has seen lately.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k.
"""

import numpy as np

from moeplace.runtime.engine.windows.rows import RecentRows

_PENDING_IDS = 1 << 20
"""Ids that may wait to be counted: 8 MiB."""


class LoadWindow:
    """Routing seen by this rank since the last reset: the input of a re-planning decision.

    Every token is counted by exactly one rank (the one that routes it), so loads of all ranks add up. Ids are counted
    when they are asked for, or when many have gathered: not inside the layer that routed them.

    Attributes:
        recent: rows of the last passes, to be joined with those of other ranks; None = not kept.
    """

    def __init__(self, num_layers: int, num_experts: int, *, keep: int = 0) -> None:
        """`keep`: recent tokens of all ranks whose ids are kept; 0 = none."""
        self.recent = RecentRows(num_layers, keep=keep) if keep else None
        self._load = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._pending: list[tuple[int, np.ndarray]] = []
        self._num_pending = 0

    @property
    def names_tokens(self) -> bool:
        """Whether rows are kept, which need the tokens' numbers."""
        return self.recent is not None

    @property
    def load(self) -> np.ndarray:
        """(L, E) int64, assignments per expert."""
        self._count()
        return self._load

    def record(self, layer: int, ids: np.ndarray, token: np.ndarray | None = None) -> None:
        """Add the ids (T, K), -1 = none, of tokens routed in `layer`. Arrays are kept, not copied.

        Args:
            layer: MoE layer.
            ids: expert ids.
            token: (T,) number of each token in the pass's batch; needed where rows are kept.
        """
        if self.recent is not None and token is not None:
            self.recent.record(layer, ids, token)
        self._pending.append((layer, ids))
        self._num_pending += ids.size
        if self._num_pending >= _PENDING_IDS or len(self._pending) >= _PENDING_IDS // 256:  # a record costs too
            self._count()

    def reset(self) -> None:
        """Forget everything, on all ranks at the same step boundary."""
        self._load[:] = 0
        self._pending.clear()
        self._num_pending = 0
        if self.recent is not None:
            self.recent.clear()

    def _count(self) -> None:
        for layer, ids in self._pending:
            flat = ids.reshape(-1)
            self._load[layer] += np.bincount(flat[flat >= 0], minlength=self._load.shape[1])
        self._pending.clear()
        self._num_pending = 0
