"""Settings: what an operator says to the policy inside an engine, in environment variables.

Engines forbid keys of others in their configurations, and their worker processes inherit the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

BALANCE = "moeplace"
FILE = "moeplace-file"
"""The two policies: plan from the loads; or load a placement file."""
POLICY_VARIABLE = "MOEPLACE_POLICY"


@dataclass(frozen=True)
class Settings:
    """Of the policy in an engine.

    Attributes:
        policy: `MOEPLACE_POLICY`, "moeplace" or "moeplace-file": replaces the engine's own; None = nothing does.
        placement: `MOEPLACE_PLACEMENT`, the placement file of "moeplace-file".
        trace: `MOEPLACE_TRACE`, the recorded trace that "moeplace" plans with besides the loads.
        limits: of `plan`: `MOEPLACE_MAX_MOVES`, `MOEPLACE_MAX_MOVES_PER_RANK`, `MOEPLACE_MAX_MOVES_ACROSS_NODES`,
            `MOEPLACE_MOVE_PRICE`, `MOEPLACE_TIME_LIMIT`, `MOEPLACE_MAX_IMBALANCE`, `MOEPLACE_TRACE_TIME_LIMIT`, those
            that are set.
    """

    policy: str | None = None
    placement: str | None = None
    trace: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Raises ValueError, naming the variable, where a value breaks its rule."""
        given = {name: text.strip() for name, text in (environment or os.environ).items() if text.strip()}
        policy, placement = given.get(POLICY_VARIABLE), given.get("MOEPLACE_PLACEMENT")
        if policy not in (None, BALANCE, FILE):
            raise ValueError(f"{POLICY_VARIABLE} ({policy}) must be {BALANCE} or {FILE}")
        if policy == FILE and placement is None:
            raise ValueError(f"{POLICY_VARIABLE}={FILE} needs MOEPLACE_PLACEMENT, the path of a placement file")
        limits = {
            name: _number(f"MOEPLACE_{name.upper()}", given[f"MOEPLACE_{name.upper()}"], kind)
            for name, kind in _LIMITS.items()
            if f"MOEPLACE_{name.upper()}" in given
        }
        if limits.get("max_imbalance", 1) < 1:
            raise ValueError(f"MOEPLACE_MAX_IMBALANCE ({limits['max_imbalance']:g}) must be a number of at least 1")
        return cls(policy, placement, given.get("MOEPLACE_TRACE"), limits)

    def check_trace(self) -> None:
        """Raises ValueError where the trace is no file that can be read."""
        if self.trace is not None and not (os.path.isfile(self.trace) and os.access(self.trace, os.R_OK)):
            raise ValueError(f"MOEPLACE_TRACE ({self.trace}) must be a file that can be read")


_LIMITS: dict[str, type[int] | type[float]] = {
    "max_moves": int,
    "max_moves_per_rank": int,
    "max_moves_across_nodes": int,
    "move_price": float,
    "time_limit": float,
    "max_imbalance": float,
    "trace_time_limit": float,
}


def _number(variable: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = kind(-1)
    if not 0 <= value < float("inf"):
        rule = "a whole number" if kind is int else "a number"
        raise ValueError(f"{variable} ({text}) must be {rule}, not negative")
    return value
