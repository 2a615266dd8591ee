"""What plug-ins of engines ask, and the two policies that answer: plan from the loads, or load a placement file.

Shape letters: L MoE layers, E experts, R ranks, C slots per rank, S = R * C slots per layer.
"""

import logging
from dataclasses import dataclass

import numpy as np

from moeplace.placement.policy.answer import Answer
from moeplace.placement.policy.in_force import of_file
from moeplace.placement.policy.planning import plan
from moeplace.placement.policy.settings import Settings

_log = logging.getLogger("moeplace.policy")


@dataclass(frozen=True, eq=False)
class Asked:
    """A question of an engine's balancer.

    Attributes:
        load: (L, E) or (steps, L, E) assignments.
        ranks: R.
        slots_per_rank: C.
        nodes: of the ranks.
        groups: expert groups of the router.
        before: (L, S) map in force in the width that is asked for, -1 = a slot of a rank that is new; None = none yet.
        wait: for the compiler, because ranks cannot compare what they found.
        replica_rule: of the engine.
        use_trace: whether `MOEPLACE_TRACE` counts, where it is set.
    """

    load: np.ndarray
    ranks: int
    slots_per_rank: int
    nodes: int
    groups: int
    before: np.ndarray | None
    wait: bool
    replica_rule: str
    use_trace: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, E, S."""
        return self.load.shape[-2], self.load.shape[-1], self.ranks * self.slots_per_rank


def planned(asked: Asked) -> Answer:
    """A plan from the loads and the trace of the environment, near the map in force, within its limits.

    Where ranks came their slots must be filled, whatever moves: then limits on moves do not count.
    """
    settings = Settings.of_environment()
    limits = settings.limits
    if asked.before is not None and (asked.before < 0).any():
        limits = {name: value for name, value in limits.items() if not name.startswith("max_moves")}
    return plan(
        asked.load,
        ranks=asked.ranks,
        slots_per_rank=asked.slots_per_rank,
        nodes=asked.nodes,
        groups=asked.groups,
        previous=asked.before,
        wait=asked.wait,
        trace=settings.trace if asked.use_trace else None,
        replica_rule=asked.replica_rule,
        **limits,
    )


def of_the_file(asked: Asked) -> Answer:
    """The map of `MOEPLACE_PLACEMENT`, if it fits these layers, experts and ranks."""
    layers, experts, _ = asked.shape
    answer = of_file(
        Settings.of_environment().placement or "MOEPLACE_PLACEMENT, which is not set,",
        layers=layers,
        experts=experts,
        ranks=asked.ranks,
        slots_per_rank=asked.slots_per_rank,
        previous=asked.before,
    )
    if answer.reason is not None:
        _log.warning("moeplace loads no placement: %s", answer.reason)
    return answer
