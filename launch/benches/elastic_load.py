"""What the elastic benchmark serves and what happens meanwhile: everything follows from the seed.

Shape letters: L MoE layers, S slots per layer.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

import numpy as np

from moeplace.placement.modes import Mode
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import GREEDY, SamplingParameters
from moeplace.runtime.experts.tier_limits import TierLimits

PROMPT_TOKENS, NEW_TOKENS = (4, 24), (16, 48)
"""Least and most per request."""
ChangeKind = Literal["replacement", "join", "leave", "kill", "kill-all"]


class Change(NamedTuple):
    """Something that happens to the service.

    Attributes:
        step: decode steps before it.
        kind: what.
        chance: in [0, 1), decides whom it befalls.
    """

    step: int
    kind: ChangeKind
    chance: float


@dataclass(frozen=True)
class ElasticJob:
    """What is served, and what happens meanwhile.

    Attributes:
        model: checkpoint folder.
        ranks: processes at the start.
        steps: timed decode steps, at least.
        replacements: re-placements among them.
        joins, leaves, kills: of ranks; a rank that was killed is replaced by a new one.
        kill_alls: times that all ranks are killed at once.
        share: of all slots, changed by each re-placement.
        batch: sequences in flight; a quarter of them is admitted at a time.
        bytes_per_step: most bytes a rank sends between two steps, and most it receives.
        staging_rows: experts that a rank holds beyond its slots while they arrive.
        probe_tokens: whose logits are compared at every switch, 0 = none.
        fast_slots: experts per layer and rank in fast memory, with foresight; None = all.
        mode: execution mode.
        seed: of requests, placements and moments.
        timeout: seconds after which a rank that does not answer counts as lost.
    """

    model: str
    ranks: int = 4
    steps: int = 200
    replacements: int = 5
    joins: int = 0
    leaves: int = 0
    kills: int = 0
    kill_alls: int = 0
    share: float = 0.25
    batch: int = 32
    bytes_per_step: int = 1 << 16
    staging_rows: int = 1
    probe_tokens: int = 0
    fast_slots: int | None = None
    mode: Mode = "dispatch-combine"
    seed: int = 0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        least = {
            "ranks": 2,
            "steps": 1,
            "replacements": 0,
            "joins": 0,
            "leaves": 0,
            "kills": 0,
            "kill_alls": 0,
            "batch": 4,
            "bytes_per_step": 1,
            "staging_rows": 1,
            "probe_tokens": 0,
            "seed": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name.replace('_', ' ')} ({getattr(self, name)}) must be at least {value}")
        changes = self.replacements + self.joins + self.leaves + self.kills + self.kill_alls
        if changes > self.steps:
            raise InputError(f"changes ({changes}) must not exceed the steps ({self.steps})")
        if self.ranks + self.joins - self.leaves < 2:
            raise InputError(
                f"of {self.ranks} ranks and {self.joins} that join, {self.leaves} leave; at least 2 must stay"
            )

    @property
    def max_length(self) -> int:
        """Positions of the longest sequence."""
        return PROMPT_TOKENS[1] + NEW_TOKENS[1]

    @property
    def limits(self) -> EngineLimits:
        """Of every engine: those of the service and the one that is not disturbed."""
        tiers = None if self.fast_slots is None else TierLimits(self.fast_slots, policy="lookahead")
        return EngineLimits(
            max_sequences=self.batch, max_length=self.max_length, staging_rows=self.staging_rows, tiers=tiers
        )

    def changes(self) -> list[Change]:
        """What happens, in order, at random steps; a rank leaves only where two others stay."""
        rng = np.random.default_rng([self.seed, 1])
        counts: dict[ChangeKind, int] = {
            "replacement": self.replacements,
            "join": self.joins,
            "leave": self.leaves,
            "kill": self.kills,
            "kill-all": self.kill_alls,
        }
        in_turn = [kind for kind, count in counts.items() for _ in range(count)]
        kinds = [in_turn[index] for index in rng.permutation(len(in_turn))]
        width = self.ranks
        for index, kind in enumerate(kinds):
            if kind == "leave" and width <= 2:  # a later join comes first
                other = kinds.index("join", index)
                kinds[index], kinds[other] = "join", "leave"
            width += {"join": 1, "leave": -1}.get(kinds[index], 0)
        steps = np.sort(rng.choice(self.steps, len(kinds), replace=False)).tolist()
        return [Change(step, kind, float(rng.random())) for step, kind in zip(steps, kinds, strict=True)]

    def request(self, number: int, *, vocabulary: int) -> Request:
        """Request `number`: a random prompt; every other one is sampled, the rest greedy."""
        rng = np.random.default_rng([self.seed, 2, number])
        prompt = rng.integers(1, vocabulary, rng.integers(*PROMPT_TOKENS, endpoint=True))
        sampling = SamplingParameters(temperature=0.8, seed=number) if number % 2 else GREEDY
        new_tokens = int(rng.integers(*NEW_TOKENS, endpoint=True))
        return Request(str(number), tuple(prompt.tolist()), new_tokens, sampling, stop_ids=())


def exchange_slots(placement: Placement, *, share: float, rng: np.random.Generator) -> Placement:
    """The same cluster with `share` of the slots of every layer in other hands: their experts move on in a circle.

    Neighbours of the circle are on different ranks, so that every expert of it has to travel. Experts that are on
    several ranks, as some are after a rank was lost during a re-placement, stay where they are: another rank of the
    circle might have them already.

    Args:
        share: of the slots of a layer, at least two slots.
    """
    slots_LS = placement.slot_to_expert.copy()
    for experts in slots_LS:
        count = max(round(share * len(experts)), 2)
        circle = _circle(placement, experts, count, rng)
        experts[circle] = experts[np.roll(circle, 1)]
    return placement.replace(slot_to_expert=slots_LS)


def _circle(placement: Placement, experts: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At least `count` slots in random order, each on another rank than the one before it, and the first than the last;
    fewer where there are none, and no slot at all where only one rank has any."""
    num_replicas = np.bincount(experts[experts != EMPTY_SLOT])
    slots = [np.arange(placement.num_slots)[placement.slots_on(rank)] for rank in range(placement.num_ranks)]
    free = [own[experts[own] != EMPTY_SLOT] for own in slots]
    orders = [rng.permutation(own[num_replicas[experts[own]] == 1]).tolist() for own in free]
    rng.shuffle(orders)
    turns = [(rank, slot) for turn in zip_longest(*orders) for rank, slot in enumerate(turn) if slot is not None]
    circle: list[tuple[int, int]] = []
    for rank, slot in turns:
        if len(circle) >= count and circle[-1][0] != circle[0][0]:
            break
        if not circle or circle[-1][0] != rank:
            circle.append((rank, slot))
    while len(circle) > 1 and circle[-1][0] == circle[0][0]:  # it would close inside a rank
        circle.pop()
    return np.array([slot for _, slot in circle] if len(circle) > 1 else [], np.int64)
