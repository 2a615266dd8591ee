"""Sampling against oracles that share no code with it: published random words, sorted distributions, chi-square."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.philox import philox, uniform
from moeplace.runtime.engine.sampler import Draw, adjust_logits, draw_tokens
from moeplace.runtime.engine.sampling import SamplingParameters

UNLIKELY = 1e-6
"""Probability below which a statistic is no chance: the tests run daily with other seeds."""


@pytest.fixture(params=[1, 2, "today"])
def seed(request: pytest.FixtureRequest, dated_seed: int) -> int:
    return dated_seed if request.param == "today" else int(request.param)


KNOWN_WORDS = [  # Random123's kat_vectors: philox 4x32, 10 rounds
    ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_random_words_are_the_published_ones(counter: list[int], key: list[int], words: str) -> None:
    """The known answers of the generator's authors."""
    found = philox(np.array([counter], np.uint32), np.array([key], np.uint32))[0]
    assert " ".join(f"{word:08x}" for word in found) == words


def philox_by_hand(seed: int, counter: list[int]) -> list[int]:
    """The paper's round in Python's integers."""
    c, k = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def number_of(parameters: SamplingParameters, position: int, attempt: int = 0) -> float:
    """In [0, 1): the first 27 and the next 26 bits."""
    words = philox_by_hand(parameters.seed, [position, parameters.choice, attempt, 0])
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


def test_numbers_depend_on_every_part_of_their_key(seed: int) -> None:
    """All 64 bits of the seed, position, choice and attempt; numbers are uniform (Kolmogorov-Smirnov)."""
    rng = np.random.default_rng(seed)
    seeds = rng.integers(0, 2**64, 3000, dtype=np.uint64)
    counters = rng.integers(0, 2**32, (3000, 4), dtype=np.uint32)
    numbers = uniform(seeds, counters)
    assert kstest(numbers, "uniform").pvalue > UNLIKELY
    row = int(rng.integers(3000))
    words = philox_by_hand(int(seeds[row]), counters[row].tolist())
    assert numbers[row] == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    flipped = [seeds[:1] ^ np.uint64(1 << bit) for bit in range(64)]
    others = {float(uniform(one, counters[:1])[0]) for one in flipped}
    for word in range(4):
        changed = np.repeat(counters[:1], 32, axis=0)
        changed[:, word] ^= np.uint32(1) << np.arange(32, dtype=np.uint32)
        others |= set(uniform(np.repeat(seeds[:1], 32), changed).tolist())
    assert len(others | {float(numbers[0])}) == 64 + 4 * 32 + 1


def kept_by_sorting(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    """(V,) probabilities of a draw, by sorting: what the filters leave, renormalised."""
    scores = logits.astype(np.float64) / parameters.temperature
    probability = np.exp(scores - scores.max())
    probability[probability < parameters.min_p] = 0
    if parameters.top_k:
        probability[probability < np.sort(probability)[::-1][min(parameters.top_k, len(logits)) - 1]] = 0
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    probability[order[before >= parameters.top_p]] = 0
    return probability / probability.sum()


def random_parameters(rng: np.random.Generator) -> SamplingParameters:
    return SamplingParameters(
        temperature=float(rng.choice([0.3, 1.0, 2.5])),
        top_k=int(rng.choice([0, 1, 5, 40, 5000])),
        top_p=float(rng.choice([1.0, 0.95, 0.5, 0.05])),
        min_p=float(rng.choice([0.0, 0.0, 0.02])),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        choice=int(rng.integers(5)),
    )


def test_draws_follow_the_distribution_that_sorting_gives(seed: int) -> None:
    """Chi-square over 4,000 positions, for random filters and vocabularies of less, of exactly and of more than a
    block; nothing is drawn that the filters exclude."""
    rng = np.random.default_rng(seed)
    for vocabulary in (3, 512, 700, 1025):
        parameters = random_parameters(rng)
        logits = rng.normal(scale=3, size=vocabulary).astype(np.float32)
        logits[rng.integers(vocabulary, size=vocabulary // 8)] = logits[0]  # ties
        expected = kept_by_sorting(logits, parameters)
        draws = [Draw(parameters, position) for position in range(4000)]
        counts = np.zeros(vocabulary)
        for start in range(0, 4000, 500):
            tokens = draw_tokens(torch.tensor(logits).repeat(500, 1), draws[start : start + 500])
            counts += np.bincount(tokens.numpy(), minlength=vocabulary)
        assert counts[expected == 0].sum() == 0, (vocabulary, parameters)
        assert chi_square(counts, expected * 4000) > UNLIKELY, (vocabulary, parameters)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """P-value; rare tokens are put together."""
    rare = expected < 8
    observed = [*counts[~rare], counts[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    if wanted[-1] < 8 and len(wanted) > 1:
        observed[-2:] = [sum(observed[-2:])]
        wanted[-2:] = [sum(wanted[-2:])]
    scale = sum(observed) / sum(wanted)  # all but 1: sums of rounded probabilities
    assert scale == pytest.approx(1.0, abs=1e-5)
    return 1.0 if len(wanted) < 2 else float(chisquare(observed, np.array(wanted) * scale).pvalue)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_draw_is_the_inverse_transform_of_its_number(dtype: torch.dtype, dated_seed: int) -> None:
    """Without filters: the first token whose cumulative probability exceeds the number, up to rounding."""
    rng = np.random.default_rng(dated_seed)
    logits = torch.tensor(rng.normal(scale=2, size=(64, 3000))).to(dtype)
    draws = [
        Draw(
            SamplingParameters(temperature=0.7, seed=int(rng.integers(2**62)), choice=row % 4), int(rng.integers(9999))
        )
        for row in range(64)
    ]
    tokens = draw_tokens(logits, draws).tolist()
    for token, row, draw in zip(tokens, logits.double().numpy(), draws, strict=True):
        ends = np.cumsum(np.exp((row - row.max()) / 0.7))
        number = number_of(draw.parameters, draw.position) * ends[-1]
        assert (ends[token - 1] if token else 0) - 1e-5 * ends[-1] <= number <= ends[token] + 1e-5 * ends[-1]


def test_rows_do_not_touch_each_other() -> None:
    """A row's token is the same alone and among others, in whatever order, and the logits stay as they were."""
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(scale=2, size=(40, 30_000)), dtype=torch.float32)  # several chunks
    draws = [Draw(random_parameters(rng), position) for position in range(40)]
    draws[7] = Draw(SamplingParameters(), 3)
    before = logits.clone()
    together = draw_tokens(logits, draws).tolist()
    assert torch.equal(logits, before)
    assert together == [int(draw_tokens(logits[row : row + 1], [draw])) for row, draw in enumerate(draws)]
    order = rng.permutation(40)
    assert draw_tokens(logits[order], [draws[row] for row in order]).tolist() == [together[row] for row in order]
    assert together[7] == int(logits[7].argmax())


def different(fields: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """Twelve tokens of a long-tailed distribution for each change of the parameters or the position."""
    logits = torch.zeros(1, 1000)
    for value in count():
        changes = dict.fromkeys(fields, value)
        position = changes.pop("position", 0)
        parameters = SamplingParameters(temperature=1, **{"seed": 3, **changes})
        yield tuple(int(draw_tokens(logits, [Draw(parameters, 100 * position + step)])) for step in range(12))


@pytest.mark.parametrize("name", ["seed", "choice", "position"])
def test_every_seed_choice_and_position_draws_otherwise(name: str) -> None:
    """Of 40 values no two give the same twelve tokens of a thousand equally likely ones."""
    values = [tokens for tokens, _ in zip(different({name: None}), range(40), strict=False)]
    assert len(set(values)) == 40


def adjust_by_hand(logits: np.ndarray, draw: Draw) -> np.ndarray:
    out, p = logits.copy(), draw.parameters
    for token in set(draw.prompt) | set(draw.added):
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    for token in draw.added:
        out[token] -= p.frequency_penalty
    for token in set(draw.added):
        out[token] -= p.presence_penalty
    if len(draw.added) < p.min_tokens:
        out[list(draw.stop_ids)] = -np.inf
    return out


def test_penalties_and_least_tokens(seed: int) -> None:
    """Against loops over the tokens; greedy tokens follow, and a stop id waits for its time."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(scale=3, size=(8, 12)))
    draws = []
    for row in range(8):
        parameters = SamplingParameters(
            repetition_penalty=float(rng.choice([1, 0.5, 1.7])),
            presence_penalty=float(rng.choice([0, -1.5, 2])),
            frequency_penalty=float(rng.choice([0, -0.5, 1])),
            min_tokens=int(rng.integers(5)),
        )
        prompt, added = rng.integers(12, size=5).tolist(), rng.integers(12, size=row % 4).tolist()
        draws.append(Draw(parameters, 5 + len(added), prompt, added, stop_ids=(int(logits[row].argmax()), 3)))
    expected = np.stack([adjust_by_hand(row, draw) for row, draw in zip(logits.numpy(), draws, strict=True)])
    np.testing.assert_allclose(adjust_logits(logits, draws).numpy(), expected)
    assert draw_tokens(logits, draws).tolist() == expected.argmax(1).tolist()


def test_defaults_ask_for_nothing() -> None:
    """Whatever the sequence has: the logits stay, and the most likely token is taken."""
    draw = Draw(SamplingParameters(), 4, [0, 1], [1, 1], stop_ids=(1,))
    logits = torch.tensor([[-1.0, 3.0, 2.9]])
    assert not draw.changes_logits
    assert torch.equal(adjust_logits(logits, [draw]), logits)
    assert draw_tokens(logits, [draw]).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-9])
def test_the_smallest_temperatures_take_the_most_likely_token(dtype: torch.dtype, temperature: float) -> None:
    """No overflow leaves the last token of the vocabulary."""
    logits = torch.tensor([[0.0, 900.0, -900.0, 1.0]], dtype=dtype)
    assert int(draw_tokens(logits, [Draw(SamplingParameters(temperature=temperature, top_p=0.9), 0)])) == 1


def test_logits_that_are_not_numbers_give_some_token() -> None:
    """A defect elsewhere ends neither the sampler nor the tokens of other rows."""
    logits = torch.zeros(2, 1000)
    logits[0] = torch.nan
    logits[1, 5] = 99
    draws = [Draw(SamplingParameters(temperature=1, top_p=0.5), 0)] * 2
    broken, whole = draw_tokens(logits, draws).tolist()
    assert 0 <= broken < 1000
    assert whole == 5


@pytest.mark.parametrize(
    "changes",
    [
        *({"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"seed": -1}),
        *({"seed": 2**64}, {"min_p": 1.5}, {"repetition_penalty": 0}, {"presence_penalty": 2.5}),
        *({"frequency_penalty": float("nan")}, {"min_tokens": -1}, {"choice": -1}),
    ],
)
def test_sampling_parameters_are_checked(changes: dict[str, float]) -> None:
    """The sentence names the parameter."""
    with pytest.raises(InputError, match=next(iter(changes))):
        SamplingParameters(**changes)  # type: ignore[arg-type]
