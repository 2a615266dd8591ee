"""Rows of the cache that are no neighbours: read as stretches, or copied, and never seen to be either."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.kv import row_reading
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.row_reading import RowGathering, stretches_of
from moeplace.runtime.kv.views import DecodeView
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.token_attention import attend_to
from tests.runtime.checkpoints import VOCABULARY

FORMS = {"stretches": 0, "copies": 1 << 60}
"""What a call of attention is said to cost, so that rows are read so."""
ROWS, POSITIONS = 9, 24


def attend_one_by_one(query: torch.Tensor, cache: KvCache, rows: Any, ends: Any, window: int | None) -> torch.Tensor:
    """Token by token and head by head, by the definition."""
    out = torch.empty_like(query)
    for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
        first = 0 if window is None else max(0, end - window)
        for head in range(query.shape[1]):
            keys, values = (slab[1][row, head, first:end] for slab in (cache.keys, cache.values))
            out[index, head] = torch.softmax(query[index, head] @ keys.T, -1) @ values
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_even", [True, False])
def test_any_rows_in_any_order(
    checkpoint: Path, form: str, is_even: bool, dated_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What queries find is what they would find alone, with windows and without; new K/V are where they belong."""
    monkeypatch.setattr(row_reading, "CALL_BYTES", FORMS[form])
    rng = np.random.default_rng(dated_seed)
    cache = KvCache(Decoder(Checkpoint(checkpoint), dtype=torch.float64), rows=ROWS, positions=POSITIONS)
    heads, dim = cache.keys[0].shape[1], cache.keys[0].shape[3]
    for slab in (cache.all_keys, cache.all_values):
        slab.copy_(torch.from_numpy(rng.normal(size=slab.shape)))
    for _ in range(20):
        count = int(rng.integers(1, ROWS + 1))
        rows = rng.permutation(ROWS)[:count] if rng.random() < 0.5 else np.sort(rng.permutation(ROWS)[:count])
        last = np.full(count, rng.integers(POSITIONS)) if is_even else rng.integers(POSITIONS, size=count)
        longest, row = int(last.max()) + 1, torch.from_numpy(rows)
        view = DecodeView(
            cache,
            row=row,
            position=torch.from_numpy(last),
            longest=longest,
            even=len(set(last)) == 1,
            position_embeddings=None,
            all_layers=bool(rng.integers(2)),
        )
        key, value = torch.from_numpy(rng.normal(size=(2, count, heads, dim)))
        query = torch.from_numpy(rng.normal(size=(count, heads, 2, dim)))
        for window in (None, 5):
            seen = view.store(1, key, value)
            assert len(seen) == (len(stretches_of(row, 1)) or 1)
            found = attend_to(query, seen, mask=view.mask(window, additive=None), scale=1.0)
            for index in range(count):
                assert torch.equal(cache.keys[1][rows[index], :, last[index]], key[index])
                assert torch.equal(cache.values[1][rows[index], :, last[index]], value[index])
            expected = attend_one_by_one(query, cache, rows, last + 1, window)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        # Modules want all rows at once.
        keys, values = view.update(key[:, :, None], value[:, :, None], 1)
        for index, number in enumerate(rows):
            assert torch.equal(keys[index], cache.keys[1][number, :, :longest])
            assert torch.equal(values[index], cache.values[1][number, :, :longest])


def test_stretches_hold_every_row_once_and_in_order(dated_seed: int) -> None:
    """They are as long as they can be; more of them than copies would cost are none."""
    rng = np.random.default_rng(dated_seed)
    for _ in range(200):
        rows = np.flatnonzero(rng.random(30) < rng.random())
        if rng.random() < 0.3:
            rows = rng.permutation(rows)
        cuts = sum(int(after) != int(before) + 1 for before, after in itertools.pairwise(rows))
        for spare in (-1, 0, 1):
            row_bytes = -(-cuts * row_reading.CALL_BYTES // max(len(rows), 1)) + spare
            stretches = stretches_of(torch.from_numpy(rows), row_bytes)
            is_worth_it = cuts * row_reading.CALL_BYTES <= len(rows) * row_bytes
            assert len(stretches) == (cuts + 1 if is_worth_it and len(rows) else 0)
            if stretches:
                assert [number for part in stretches for number in range(part.start, part.stop)] == rows.tolist()


class LargestCopy(TorchDispatchMode):
    """The most elements that a copy of rows had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("form", FORMS)
def test_sequences_around_one_that_has_left(
    checkpoint: Path, form: str, dated_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokens are those of a batch without it; where rows are read as stretches, no K/V are copied."""
    monkeypatch.setattr(row_reading, "CALL_BYTES", FORMS[form])
    rng = np.random.default_rng(dated_seed)
    prompts = [tuple(rng.integers(0, VOCABULARY, 40).tolist()) for _ in range(5)]
    limits = EngineLimits(max_sequences=5, max_length=64)
    found = []
    for leaves in (True, False):
        engine = Engine(checkpoint, dtype=torch.float64, limits=limits)
        for number in range(5):
            if number != 2 or leaves:
                engine.add_request(Request(str(number), prompts[number], 8, stop_ids=()))
        engine.step()
        engine.scheduler.cancel("2")
        with LargestCopy() as copied:
            done = [completion for _ in range(7) for completion in engine.step()]
        found.append({completion.request_id: completion.token_ids for completion in done})
        sequence_kv = 40 * engine.executor.cache.row_width  # type: ignore[union-attr]
        assert (copied.elements > sequence_kv) == (leaves and form == "copies")
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_memory_of_copies_is_kept_and_grows() -> None:
    """The same for the same name; keys and values do not share it."""
    slab, gathering = torch.arange(120.0).view(5, 2, 4, 3), RowGathering()
    row = torch.tensor([3, 0])
    first = gathering.gather("keys", slab, row, 3)
    assert torch.equal(first, slab[[3, 0], :, :3])
    other = gathering.gather("values", slab, row, 3)
    assert other.data_ptr() != first.data_ptr()
    assert gathering.gather("keys", slab, row[:1], 4).data_ptr() == first.data_ptr()
    assert torch.equal(gathering.gather("keys", slab, torch.tensor([4, 1, 2]), 4), slab[[4, 1, 2]])
