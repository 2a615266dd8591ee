"""From logits to the next token: the same for any number of ranks and any mode.

The random number of a draw depends on the request's seed and the token's position alone.
"""

from dataclasses import dataclass

import torch

from moeplace.profiling.errors import InputError


@dataclass(frozen=True)
class SamplingParameters:
    """How a request wants its tokens.

    Attributes:
        temperature: 0 = the most likely token, always.
        top_k: draw among the k most likely tokens, 0 = all.
        top_p: draw among the most likely tokens whose probabilities reach p.
        seed: of the draws.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature ({self.temperature}) must be a number of at least 0")
        if self.top_k < 0:
            raise InputError(f"top_k ({self.top_k}) must be at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p ({self.top_p}) must lie above 0 and be at most 1")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed ({self.seed}) must lie in 0..2147483647")


GREEDY = SamplingParameters()
"""The most likely token, always."""


def sample(logits: torch.Tensor, parameters: SamplingParameters, *, position: int) -> int:
    """One token id from logits (V,).

    The cumulative distribution runs in the order of ids, so that rounding differences between ranks, which may swap
    almost equal tokens in a sorted order, move it by no more than themselves.
    """
    if parameters.temperature == 0:
        return int(logits.argmax())
    scores = logits.detach().to("cpu", torch.float64) / parameters.temperature
    if 0 < parameters.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(parameters.top_k).values[-1], -torch.inf)
    probability = scores.softmax(0)
    if parameters.top_p < 1:
        ordered, index = probability.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probability = probability.index_fill(0, index[before >= parameters.top_p], 0)
    cumulative = probability.cumsum(0)
    draw = _uniform(parameters.seed, position) * cumulative[-1]
    return int(torch.searchsorted(cumulative, draw, right=True).clamp(max=int(probability.nonzero()[-1])))


def _uniform(seed: int, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed << 32) + position)
    return torch.rand((), generator=generator, dtype=torch.float64)
