"""Policies: what stays in the fast memory of a rank, and what is fetched before it is asked for.

    pinned      what the placement calls resident stays; the rows left over keep what was used last
    lru         no row is pinned; the least recently used expert goes
    lfu         ... the least frequently used one
    score       ... the one of least moving score (after HybriMoE, arXiv 2504.05897): S <- a w + (1 - a) S in each
                step, w = the sum of gate weights with which the step's tokens chose the expert
    lookahead   as pinned with the moving score for what is left over; experts that a predictor names are fetched early

Any of them can have a predictor; `lookahead` must. A predictor is known by its accuracy: the share of (token, expert)
pairs of the next layer that it names, each wrong one a wrong expert instead; of the layer after next, the square of it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from moeplace.profiling.errors import InputError

PolicyName = Literal["pinned", "lru", "lfu", "score", "lookahead"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
LRU, LFU, SCORE = 0, 1, 2
SCORE_WEIGHT = 0.1
"""a of the moving score: a use counts for about ten steps. Our choice; the paper's text was not at hand."""
FATE_ACCURACY = 0.85
"""Where nothing was measured: a cautious figure between those that were reported for such gates."""


@dataclass(frozen=True)
class Predictor:
    """What is known of next layers' experts ahead of their routers.

    Attributes:
        accuracy: share of (token, expert) pairs of the next layer that it names.
        depth: layers that it looks ahead; accuracy^j for the j-th.
    """

    accuracy: float
    depth: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise InputError(f"accuracy of a predictor ({self.accuracy}) must lie in 0..1")
        if self.depth < 1:
            raise InputError(f"layers to look ahead ({self.depth}) must be at least 1")


@dataclass(frozen=True)
class Policy:
    """A policy by name, and its predictor.

    Attributes:
        name: see the module.
        predictor: None = experts are fetched when they are asked for.
    """

    name: PolicyName = "pinned"
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise InputError(f"policy {self.name!r} must be one of {', '.join(POLICIES)}")
        if self.name == "lookahead" and self.predictor is None:
            raise InputError("policy lookahead needs a predictor")

    @property
    def pins(self) -> bool:
        """Whether resident slots of the placement are never given up."""
        return self.name in ("pinned", "lookahead")

    @property
    def eviction(self) -> int:
        """LRU, LFU or SCORE: what goes from rows that are not pinned."""
        return {"lfu": LFU, "score": SCORE, "lookahead": SCORE}.get(self.name, LRU)

    @property
    def label(self) -> str:
        """For tables: the name, and the predictor where there is one."""
        if self.predictor is None:
            return self.name
        return f"{self.name} +{self.predictor.accuracy:.0%}" + f" x{self.predictor.depth}" * (self.predictor.depth > 1)
