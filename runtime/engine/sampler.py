"""From logits to the next tokens, many sequences at once on the logits' device: the same for any ranks and any mode.

Every draw is an inverse transform of one number, which the request's seed, the number of its choice, the token's
position and the attempt fix (`philox`). The cumulative distribution runs in the order of token ids, so that rounding
differences between ranks, which may swap almost equal tokens in a sorted order, move it by no more than themselves.

No vocabulary is sorted. The tokens of top-p are those whose more likely tokens have together less than p; whether one
token is among them is seen by one sum. So a token is drawn of all, and one that is not among them is drawn again, of
those that are more likely than it: the distribution is that of top-p, since all of its tokens are more likely than any
other (rejection sampling as in FlashInfer, Ye et al. 2025). At a temperature and a p in use that takes 1 to 2 attempts.

Shape letters: B sequences, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moeplace.runtime.engine.philox import uniform
from moeplace.runtime.engine.sampling import SamplingParameters

_BLOCK = 512
"""Tokens whose weights are added first: a draw finds its block, then its token there."""
_CHUNK_ELEMENTS = 1 << 19
"""Logits that are handled together on a CPU: what its caches hold."""


@dataclass(frozen=True, eq=False)
class Draw:
    """A token to be drawn.

    Attributes:
        parameters: how.
        position: of the token in its sequence, prompt included.
        prompt: token ids of the prompt.
        added: those added since.
        stop_ids: of the request.
    """

    parameters: SamplingParameters
    position: int
    prompt: Sequence[int] = ()
    added: Sequence[int] = ()
    stop_ids: Collection[int] = ()

    @property
    def changes_logits(self) -> bool:
        return self.parameters.has_penalties or len(self.added) < self.parameters.min_tokens


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """(B,) int64 next tokens from logits (B, V); the logits stay as they are."""
    if any(draw.changes_logits for draw in draws):
        logits = adjust_logits(logits, draws)
    tokens = logits.argmax(1)
    random = [row for row, draw in enumerate(draws) if draw.parameters.temperature > 0]
    vocabulary = logits.shape[1]
    together = max(_CHUNK_ELEMENTS // vocabulary, 1) if logits.device.type == "cpu" else len(random)
    for start in range(0, len(random), max(together, 1)):
        chunk = random[start : start + together]
        index = torch.tensor(chunk, device=logits.device)
        tokens[index] = _draw_random(logits[index], [draws[row] for row in chunk])
    return tokens


def adjust_logits(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Logits (B, V) after penalties, without the stop ids that come too early: a copy."""
    logits = logits.clone()
    for row, draw in enumerate(draws):
        if draw.parameters.has_penalties:
            _penalise(logits[row], draw)
        if len(draw.added) < draw.parameters.min_tokens:
            stops = [token for token in draw.stop_ids if 0 <= token < logits.shape[1]]
            logits[row, torch.tensor(stops, dtype=torch.int64, device=logits.device)] = -torch.inf
    return logits


def _penalise(logits_V: torch.Tensor, draw: Draw) -> None:
    """In place."""
    parameters = draw.parameters
    seen, _ = _ids_and_counts([*draw.prompt, *draw.added], logits_V)
    found = logits_V[seen]
    factor = parameters.repetition_penalty
    logits_V[seen] = torch.where(found > 0, found / factor, found * factor)
    added, counts = _ids_and_counts(draw.added, logits_V)
    logits_V[added] -= parameters.presence_penalty + parameters.frequency_penalty * counts.to(logits_V.dtype)


def _ids_and_counts(token_ids: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, counts = np.unique(np.asarray(token_ids, np.int64), return_counts=True)
    return torch.as_tensor(ids, device=like.device), torch.as_tensor(counts, device=like.device)


def _draw_random(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """(B,) tokens; the logits are overwritten where their type allows it."""
    parameters = [draw.parameters for draw in draws]
    weights_BV = _weights(logits_BV, [p.temperature for p in parameters])
    if any(p.top_k or p.min_p for p in parameters):
        _drop_unlikely(weights_BV, parameters)
    sums_BC = _block_sums(weights_BV)
    token_B = _pick(weights_BV, sums_BC, _uniform(draws, 0, weights_BV.device))
    open_rows = [row for row, p in enumerate(parameters) if p.top_p < 1]
    if not open_rows:
        return token_B
    index_B = torch.tensor(open_rows, device=weights_BV.device)
    top_p = torch.tensor([parameters[row].top_p for row in open_rows], dtype=torch.float64, device=weights_BV.device)
    room_B = top_p * sums_BC[index_B].sum(1)
    if len(open_rows) < len(draws):
        weights_BV = weights_BV[index_B]
    attempt = 0
    while True:
        weights_BV.masked_fill_(~_ahead(weights_BV, token_B[index_B]), 0)
        sums_BC = _block_sums(weights_BV)
        rejected = (sums_BC.sum(1) >= room_B).nonzero().squeeze(1)
        if not len(rejected):
            return token_B
        attempt += 1
        weights_BV, index_B, room_B = weights_BV[rejected], index_B[rejected], room_B[rejected]
        again = _uniform([draws[row] for row in index_B.tolist()], attempt, weights_BV.device)
        token_B[index_B] = _pick(weights_BV, sums_BC[rejected], again)


def _uniform(draws: Sequence[Draw], attempt: int, device: torch.device) -> torch.Tensor:
    """(B,) float64 in [0, 1)."""
    seeds = np.array([draw.parameters.seed for draw in draws], np.uint64)
    counters = np.array([[draw.position, draw.parameters.choice, attempt, 0] for draw in draws], np.uint32)
    return torch.as_tensor(uniform(seeds, counters), device=device)


def _weights(logits_BV: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """(B, V) probabilities in units of each row's largest one; float32, or float64 where the logits are."""
    scores_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.to(torch.float32)
    scores_BV -= scores_BV.amax(1, keepdim=True)  # before the division: the largest score must stay finite, and 0
    tiny = torch.finfo(scores_BV.dtype).tiny
    divisors = [[max(temperature, tiny)] for temperature in temperatures]
    scores_BV /= torch.tensor(divisors, dtype=scores_BV.dtype, device=scores_BV.device)
    return scores_BV.exp_()


def _drop_unlikely(weights_BV: torch.Tensor, parameters: Sequence[SamplingParameters]) -> None:
    """Top-k and min-p, in place."""
    floors = torch.tensor([[p.min_p] for p in parameters], dtype=weights_BV.dtype, device=weights_BV.device)
    limits = [p.top_k if p.top_k < weights_BV.shape[1] else 0 for p in parameters]
    if any(limits):
        largest = weights_BV.topk(max(limits), dim=1).values
        column = torch.tensor([[max(limit - 1, 0)] for limit in limits], device=weights_BV.device)
        has_limit = torch.tensor([[limit > 0] for limit in limits], device=weights_BV.device)
        floors = torch.maximum(floors, torch.where(has_limit, largest.gather(1, column), 0))
    weights_BV.masked_fill_(weights_BV < floors, 0)


def _ahead(weights_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """(B, V) bool: more likely than a token, or as likely with a lower id."""
    own_B1 = weights_BV.gather(1, token_B[:, None])
    ids_V = torch.arange(weights_BV.shape[1], device=weights_BV.device)
    return (weights_BV > own_B1) | ((weights_BV == own_B1) & (ids_V < token_B[:, None]))


def _block_sums(weights_BV: torch.Tensor) -> torch.Tensor:
    """(B, C) float64 sums of consecutive blocks."""
    whole = weights_BV.shape[1] // _BLOCK * _BLOCK
    sums = weights_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2) if whole else weights_BV[:, :0]
    return torch.cat([sums, weights_BV[:, whole:].sum(1, keepdim=True)], dim=1).to(torch.float64)


def _pick(weights_BV: torch.Tensor, sums_BC: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """(B,) the token at a share of the cumulative weight; never one without weight."""
    ends_BC = sums_BC.cumsum(1)
    target_B = uniform_B * ends_BC[:, -1]
    block_B = _first_beyond(ends_BC, target_B)
    before_B = (ends_BC - sums_BC).gather(1, block_B[:, None]).squeeze(1)
    column_BW = block_B[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside_BW = weights_BV.gather(1, column_BW.clamp(max=weights_BV.shape[1] - 1)).to(torch.float64)
    inside_BW.masked_fill_(column_BW >= weights_BV.shape[1], 0)
    token_B = block_B * _BLOCK + _first_beyond(inside_BW.cumsum(1), target_B - before_B)
    return token_B.clamp(max=weights_BV.shape[1] - 1)  # of logits that are not numbers any token is as good


def _first_beyond(ends_BC: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """(B,) first entry that ends beyond the target; at most the last one that adds something, whatever is rounded."""
    first = torch.searchsorted(ends_BC, target_B[:, None], right=True)
    last = torch.searchsorted(ends_BC, ends_BC[:, -1:].contiguous())
    return torch.minimum(first, last).squeeze(1).clamp(max=ends_BC.shape[1] - 1)
