"""Log-probabilities: those of the plain model, with any ranks and in any mode, at the cost of no collective."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.modes import MODES
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.logprobs import LEAST, TokenLogprob, WantedLogprobs
from moeplace.runtime.engine.requests import Completion, Request
from moeplace.runtime.engine.sampling import SamplingParameters
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import save_checkpoint

WISHES = (None, 0, 3, 1, None, 20)


def ask(number: int, wish: int | None) -> Request:
    """Every other one is drawn, with penalties, of which log-probabilities know nothing."""
    drawn = SamplingParameters(temperature=0.7, seed=number, repetition_penalty=1.4, top_k=9)
    sampling = drawn if number % 2 else SamplingParameters()
    return Request(str(number), tuple(range(1, 3 + number)), 4 + number % 3, sampling, stop_ids=(), logprobs=wish)


def serve(context: RankContext, path: Path, mode: str, wishes: Any) -> tuple[list[Completion], dict[str, int]]:
    """Completions of this rank, and its collectives by kind."""
    group = context.group()
    limits = EngineLimits(max_sequences=4 * context.size, max_length=24)
    engine = Engine(path, mode=mode, group=group, dtype=torch.float64, limits=limits)
    engine.group.counters.reset()
    completions = engine.generate([ask(*pair) for pair in enumerate(wishes)])
    return completions, dict(engine.group.counters.totals()["collectives"])


def expect(model: Any, request: Request, completion: Completion) -> list[tuple[float, list[tuple[int, float]]]]:
    """By the definition, in numpy: of each token its own, and the likeliest of all."""
    result = []
    for index, token in enumerate(completion.token_ids):
        ids = [*request.token_ids, *completion.token_ids[:index]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
        values = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-values, kind="stable")[: request.logprobs]
        result.append((float(values[token]), [(int(other), float(values[other])) for other in best]))
    return result


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_they_are_the_plain_models(pool: RankPool, tmp_path: Path, mode: str, size: int) -> None:
    """Whether or not others of the batch want them; and wanting them changes no token and adds no collective."""
    model = save_checkpoint("olmoe", tmp_path).double().eval()
    plain = pool.run(serve, tmp_path, mode, [None] * len(WISHES), size=size)
    for (completions, collectives), (unasked, before) in zip(
        pool.run(serve, tmp_path, mode, WISHES, size=size), plain, strict=True
    ):
        assert [c.token_ids for c in completions] == [c.token_ids for c in unasked]
        assert Counter(collectives) == Counter(before)
        for number, (wish, completion) in enumerate(zip(WISHES, completions, strict=True)):
            if wish is None:
                assert completion.logprobs == ()
                continue
            expected = expect(model, ask(number, wish), completion)
            for found, (own, top) in zip(completion.logprobs, expected, strict=True):
                assert found is not None
                assert found.value == pytest.approx(own, abs=1e-8)
                assert [token for token, _ in found.top] == [token for token, _ in top]
                assert [value for _, value in found.top] == pytest.approx([value for _, value in top], abs=1e-8)


def test_what_json_cannot_say() -> None:
    """Tokens without any probability, logits that are no numbers, and a vocabulary smaller than what is asked for."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [torch.nan, 0.0, 0.0]])
    wanted = WantedLogprobs.of([None, 5, 2])
    message = torch.zeros(wanted.size, dtype=torch.int64)
    wanted.write(message, [1, 2], logits, torch.tensor([1, 0]))
    found = wanted.read(message.tolist())
    assert (found[1].value, found[2].value) == (LEAST, LEAST)
    assert [token for token, _ in found[1].top] == [2, 0, 1]
    assert found[1].top[0][1] == pytest.approx(float(torch.log_softmax(torch.tensor([0.0, 1.0]), 0)[1]))
    assert TokenLogprob.from_json(found[1].to_json()) == found[1]
