"""What the elastic benchmark serves and when it re-places: everything follows from the seed, on every process alike.

Shape letters: L MoE layers, S slots per layer.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Mode, Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.files import read_json, write_json
from moeplace.runtime.batch import Request
from moeplace.runtime.sampling import GREEDY, SamplingParameters

JOB = "job.json"
PROMPT_TOKENS, NEW_TOKENS = (4, 24), (16, 48)
"""Least and most per request."""


@dataclass(frozen=True)
class ElasticJob:
    """What every rank does.

    Attributes:
        model: checkpoint folder.
        ranks: processes.
        steps: timed decode steps.
        replacements: re-placements among them.
        share: of all slots, changed by each.
        batch: sequences in flight; a quarter of them is admitted at a time.
        bytes_per_step: most bytes a rank sends between two steps, and most it receives.
        staging_rows: storage rows per layer beyond the slots.
        mode: execution mode.
        seed: of requests, placements and moments.
        timeout: seconds to wait for another rank.
    """

    model: str
    ranks: int = 4
    steps: int = 200
    replacements: int = 5
    share: float = 0.25
    batch: int = 32
    bytes_per_step: int = 1 << 16
    staging_rows: int = 1
    mode: Mode = "dispatch-combine"
    seed: int = 0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        least = {
            "ranks": 2,
            "steps": 1,
            "replacements": 0,
            "batch": 4,
            "bytes_per_step": 1,
            "staging_rows": 1,
            "seed": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name.replace('_', ' ')} ({getattr(self, name)}) must be at least {value}")
        if self.replacements > self.steps:
            raise InputError(f"replacements ({self.replacements}) must not exceed the steps ({self.steps})")

    def save(self, folder: Path) -> None:
        """Write the job file."""
        write_json(folder / JOB, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "ElasticJob":
        """Read the job file."""
        document: dict[str, Any] = read_json(folder / JOB)
        return cls(**document)

    @property
    def max_length(self) -> int:
        """Positions of the longest sequence."""
        return PROMPT_TOKENS[1] + NEW_TOKENS[1]

    def moments(self) -> list[int]:
        """Decode steps after which a re-placement is due, rising; it starts when the one before is done."""
        rng = np.random.default_rng([self.seed, 1])
        return sorted(rng.choice(self.steps, self.replacements, replace=False).tolist())

    def request(self, number: int, *, vocabulary: int) -> Request:
        """Request `number`: a random prompt; every other one is sampled, the rest greedy."""
        rng = np.random.default_rng([self.seed, 2, number])
        prompt = rng.integers(1, vocabulary, rng.integers(*PROMPT_TOKENS, endpoint=True))
        sampling = SamplingParameters(temperature=0.8, seed=number) if number % 2 else GREEDY
        new_tokens = int(rng.integers(*NEW_TOKENS, endpoint=True))
        return Request(str(number), tuple(prompt.tolist()), new_tokens, sampling, stop_ids=())

    def placements(self, first: Placement) -> list[Placement]:
        """The placements served one after another, `first` included."""
        rng, served = np.random.default_rng([self.seed, 3]), [first]
        for _ in range(self.replacements):
            served.append(exchange_slots(served[-1], share=self.share, rng=rng))
        return served


def exchange_slots(placement: Placement, *, share: float, rng: np.random.Generator) -> Placement:
    """The same cluster with `share` of the slots of every layer in other hands: their experts move on in a circle.

    Neighbours of the circle are on different ranks, so that every expert of it has to travel.

    Args:
        placement: without replicas.
        share: of the slots of a layer, at least two slots.
    """
    slots_LS = placement.slot_to_expert.copy()
    for experts in slots_LS:
        turns = list(_by_turns(placement, experts, rng))
        count = min(max(round(share * len(experts)), 2), len(turns))
        count += count % placement.num_ranks == 1  # otherwise the circle closes inside a rank
        circle = turns[:count]
        experts[circle] = experts[np.roll(circle, 1)]
    return placement.replace(slot_to_expert=slots_LS)


def _by_turns(placement: Placement, experts: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Filled slots in random order, one of every rank in turn."""
    slots = [np.arange(placement.num_slots)[placement.slots_on(rank)] for rank in range(placement.num_ranks)]
    orders = [rng.permutation(own[experts[own] != EMPTY_SLOT]).tolist() for own in slots]
    rng.shuffle(orders)
    return (slot for slot in chain.from_iterable(zip_longest(*orders)) if slot is not None)
