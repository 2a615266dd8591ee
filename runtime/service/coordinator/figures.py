"""ServiceFigures: the counters of all members, added up over their lives.

Shape letters: L MoE layers, E experts per layer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class ServiceFigures:
    """What members last reported; those of members that are gone stay in the sums, so that these only rise."""

    def __init__(self) -> None:
        self._counters: dict[int, Mapping[str, Any]] = {}
        self._load: dict[int, np.ndarray] = {}
        self._tokens: dict[int, np.ndarray] = {}
        self._tokens_before: dict[int, np.ndarray] = {}
        self._ended: set[int] = set()
        self._counters_of_ended: dict[str, Any] = {}
        self._load_of_ended: np.ndarray | None = None
        self._passes: Counter[str] = Counter()
        self._pass_seconds: Counter[str] = Counter()
        self._kv = (0, 0)

    def note_pass(self, phase: Any, seconds: Any, kv: Any) -> None:
        """Take a pass of the ranks, as far as its report says something of it."""
        if isinstance(phase, str) and isinstance(seconds, int | float):
            self._passes[phase] += 1
            self._pass_seconds[phase] += seconds  # type: ignore[assignment]  # a counter of seconds
        if isinstance(kv, list) and len(kv) == 2 and all(isinstance(number, int) for number in kv):
            self._kv = (kv[0], kv[1])

    def passes(self) -> dict[str, Any]:
        """What `note_pass` has gathered, as fields of a status."""
        return {
            "passes": dict(self._passes),
            "pass_seconds": dict(self._pass_seconds),
            "kv_used": self._kv[0],
            "kv_room": self._kv[1],
        }

    def report(self, member: int, counters: Mapping[str, Any], tokens_L: Sequence[int], load: Any) -> None:
        """Take a member's report."""
        self._counters[member] = counters
        self._tokens[member] = np.array(tokens_L)
        self._load[member] = np.array(load)

    def note_end(self, member: int) -> None:
        """A member has ended, and all that it reported was taken: from the next generation on it is a sum alone."""
        self._ended.add(member)

    def begin_generation(self) -> None:
        """Balance is that of the assignments from now on."""
        for member in self._ended & set(self._counters):
            self._counters_of_ended = _add(self._counters_of_ended, self._counters.pop(member))
            load = self._load.pop(member)
            self._load_of_ended = load if self._load_of_ended is None else self._load_of_ended + load
            del self._tokens[member]
        self._ended.clear()
        self._tokens_before = dict(self._tokens)

    def counters(self) -> dict[str, Any]:
        """Sums over members."""
        total = self._counters_of_ended
        for counters in self._counters.values():
            total = _add(total, counters)
        return total

    def load(self) -> np.ndarray | None:
        """(L, E) int64 routed assignments per expert since the start; None = nothing was reported."""
        loads = [*self._load.values(), *([] if self._load_of_ended is None else [self._load_of_ended])]
        return sum(loads, start=np.int64(0)) if loads else None  # type: ignore[return-value]

    def imbalance_per_layer(self, active: Sequence[int]) -> tuple[float, ...]:
        """(L,) most over mean of the assignments that active members have computed in this generation."""
        computed = [self._tokens[m] - self._tokens_before.get(m, 0) for m in active if m in self._tokens]
        if not computed:
            return ()
        tokens_RL = np.stack(computed)
        mean_L = tokens_RL.sum(axis=0) / max(len(active), 1)
        return tuple(np.where(mean_L > 0, tokens_RL.max(axis=0) / np.maximum(mean_L, 1e-9), 1.0).tolist())


def _add(total: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers added key by key, inside nested mappings too."""
    names = [*total, *(name for name in more if name not in total)]
    return {name: _sum(total.get(name), more.get(name)) for name in names}


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return _add(one or {}, other or {})
    return (one or 0) + (other or 0)
