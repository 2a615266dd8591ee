"""What a decode step calls, counted: numbers that no machine changes. They are bounds, not aims."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from tests.shared_data import tiny_moe_path

MOST = {1: 1250, 8: 1500, 64: 1500}
"""Sequences -> operator events of a step of six layers, operators inside operators included. Before slots were reckoned
on the host and single tokens had an attention of their own they were 2,181, 2,898 and 4,510."""


@pytest.mark.parametrize("sequences", MOST)
def test_a_decode_step_stays_small(sequences: int) -> None:
    """On one rank, for sequences that are not alike."""
    engine = Engine(tiny_moe_path(), dtype=torch.float32, limits=EngineLimits(max_sequences=sequences, max_length=64))
    for number in range(sequences):
        prompt = tuple((number * 97 + position * 31) % 4000 for position in range(4 + number % 5))
        engine.add_request(Request(str(number), prompt, max_new_tokens=20, stop_ids=()))
    for _ in range(4):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        engine.step()
    assert len(found.events()) <= MOST[sequences]
