"""Disagreement, lost peers and bad input between ranks: every rank ends with one sentence, none hangs."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.errors import DisagreementError, PeerLostError
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatcher import Step
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.placements import random_placement
from tests.runtime.toy_layers import ToyModel


def start_engine(context: RankContext, path: Path, what: str) -> str:
    """The sentence with which this rank ends, when the last rank is given something else."""
    group = context.group()
    odd = context.rank == context.size - 1
    placement = random_placement(3, 6, context.size, seed=1 + (odd and what == "placement"))
    mode = "allgather" if odd and what == "mode" else "coherent"
    if odd and what == "size":
        placement = random_placement(3, 6, context.size + 1, seed=1)
    if odd and what == "missing":
        path = path / "nothing"
    try:
        Engine(path, placement, mode=mode, group=group)
    except (DisagreementError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("what", ["placement", "mode", "size", "missing"])
def test_disagreement_ends_every_rank(pool: RankPool, checkpoint: Path, what: str) -> None:
    """One rank has other inputs: all ranks say so, before any collective."""
    sentences = pool.run(start_engine, checkpoint, what, size=3)
    assert all(sentence != "no error" for sentence in sentences)
    if what in ("placement", "mode"):
        assert all(f"disagree about the {what}" in sentence for sentence in sentences)
    else:
        assert all("rank 2 gave up: " in sentence for sentence in sentences[:2])
        assert sentences[2].startswith("InputError: ")


def dispatch_until_killed(context: RankContext, victim: int) -> str:
    """The sentence of a survivor when `victim` kills itself between two steps."""
    model = ToyModel.random(12, layers=2, experts=6, top_k=2, seed=1)
    group = context.group()
    runtime = model.runtime(random_placement(2, 6, context.size, seed=1), context.rank, group.counters)
    dispatcher = CoherentDispatcher(runtime, group)
    try:
        for step in range(20):
            if step == 3 and context.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            model.run(dispatcher, context.rank, Step((4, 4, 4)))
    except PeerLostError as error:
        return f"step {step}: {error}"
    return "no error"


def test_a_killed_rank_is_noticed_by_every_survivor() -> None:
    """Survivors raise PeerLostError within the timeout; the process of the victim is gone."""
    ranks = RankPool(3)
    try:
        with pytest.raises(AssertionError, match="rank 1: died"):
            ranks.run(dispatch_until_killed, 1)
        survivors = [result for result in ranks.last_results if result is not None]
    finally:
        ranks.close()
    assert len(survivors) == 2
    assert all(re.match(r"step 3: rank . of 3 lost a peer during dispatch", sentence) for sentence in survivors)


def lose_a_peer_at_start(context: RankContext) -> str:
    """Rank 1 never agrees."""
    group = context.group()
    group.timeout = 2
    try:
        if context.rank == 0:
            group.agree({"placement": "a"})
    except PeerLostError as error:
        return str(error)
    return "no error"


def test_a_silent_rank_is_given_up_after_the_timeout(pool: RankPool) -> None:
    """A rank that does not report ends the others in time."""
    assert "lost a peer during waiting for rank 1" in pool.run(lose_a_peer_at_start, size=2)[0]


def test_a_placement_for_another_model_is_refused(checkpoint: Path) -> None:
    """Layers, experts and layer numbers must be the model's."""
    model = Checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"2 MoE layers of 6 experts, but .* 3 MoE layers of 6 experts"):
        Engine(model, random_placement(2, 6, 1, seed=0))
    with pytest.raises(InputError, match="of 8 experts"):
        Engine(model, random_placement(3, 8, 1, seed=0))
    with pytest.raises(InputError, match=r"MoE layers \[1, 2, 3\], but those of .* are \[0, 1, 2\]"):
        Engine(model, random_placement(3, 6, 1, seed=0, layer_ids=np.array([1, 2, 3])))
    with pytest.raises(InputError, match="placement is for 2 ranks, but 1 are running"):
        Engine(model, random_placement(3, 6, 2, seed=0))
    with pytest.raises(InputError, match="mode 'fast' must be"):
        Engine(model, mode="fast")


def test_limits_are_refused_clearly(checkpoint: Path) -> None:
    """A request that can never fit, a K/V budget below one sequence, ids out of range, names in use."""
    engine = Engine(checkpoint, limits=EngineLimits(max_length=8), dtype=torch.float32)
    with pytest.raises(InputError, match=r"needs 9 positions .* holds at most 8"):
        engine.add_request(Request("long", (1, 2, 3), max_new_tokens=6))
    with pytest.raises(InputError, match=r"token id 99, which must lie in 0\.\.59"):
        engine.add_request(Request("foreign", (99,), max_new_tokens=2))
    engine.add_request(Request("twice", (1,), max_new_tokens=2))
    with pytest.raises(InputError, match="already in flight"):
        engine.add_request(Request("twice", (1,), max_new_tokens=2))
    with pytest.raises(InputError, match=r"K/V budget \(100 bytes\)"):
        Engine(checkpoint, limits=EngineLimits(kv_bytes=100))
    with pytest.raises(InputError, match="max_length"):
        Engine(checkpoint, limits=EngineLimits(max_length=1000))
