"""SamplingParameters: how a request wants its tokens."""

from dataclasses import dataclass

from moeplace.profiling.errors import InputError

SEEDS = 2**64
"""How many seeds there are."""
_MOST_PENALTY = 2.0
"""As in OpenAI's API."""


@dataclass(frozen=True)
class SamplingParameters:
    """See the module. A token is drawn from the softmax of the logits after penalties, divided by the temperature.

    Attributes:
        temperature: 0 = the most likely token, always.
        top_k: draw among the k most likely tokens (and those as likely as the k-th), 0 = all.
        top_p: draw among the most likely tokens whose probabilities reach p, after `top_k` and `min_p`.
        min_p: draw among tokens whose probability is at least this share of the largest one.
        repetition_penalty: logits of tokens that the sequence has, prompt included, are divided by it where positive
            and multiplied by it where negative (Keskar et al. 2019); 1 = none.
        presence_penalty: taken off the logits of tokens that were added.
        frequency_penalty: the same, times how often each was added.
        min_tokens: tokens that come before a stop id may.
        seed: of the draws.
        choice: number of the completion among those of one request, which have the same seed.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    choice: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature ({self.temperature}) must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p ({self.top_p}) must lie above 0 and be at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p ({self.min_p}) must lie in 0..1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty ({self.repetition_penalty}) must be a positive number")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -_MOST_PENALTY <= getattr(self, name) <= _MOST_PENALTY:
                raise InputError(f"{name} ({getattr(self, name)}) must lie in -2..2")
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 0")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"seed ({self.seed}) must lie in 0..{SEEDS - 1}")
        if not 0 <= self.choice < 2**32:
            raise InputError(f"choice ({self.choice}) must lie in 0..{2**32 - 1}")

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens of the sequence count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = SamplingParameters()
"""The most likely token, always."""
