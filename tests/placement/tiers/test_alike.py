"""Batches of alike requests: the same tokens in another arrangement, families found by their first tokens."""

import numpy as np
import pytest

from moeplace.placement.tiers.alike import FIRST, batch_alike, group_alike
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace


def families(seed: int, *, requests: int, tokens: int) -> RoutingTrace:
    """Requests of two families in drawn order: experts 0..3 or 4..7 of each of three layers."""
    draw = np.random.default_rng(seed)
    family_T = np.repeat(draw.permutation(np.arange(requests) % 2), tokens)
    ids = np.argsort(draw.random((requests * tokens, 3, 4)), axis=2)[:, :, :2] + 4 * family_T[:, None, None]
    return RoutingTrace(ids, np.full(3, 8), sequence_ids=np.repeat(np.arange(requests), tokens))


def test_families_come_together(dated_seed: int) -> None:
    """A step of alike requests asks for the four experts of one family at most; both arrangements serve the same."""
    for seed in (0, dated_seed):
        trace = families(seed, requests=16, tokens=FIRST + 5)
        batches = batch_alike(trace, batch=4, steps=5, seed=seed)
        assert batches.requests == 16
        ids = np.asarray(batches.alike.topk_ids).reshape(4, -1, 3, 2)  # lane, step
        assert ((ids >= 4).all(axis=(0, 2, 3)) | (ids < 4).all(axis=(0, 2, 3))).all()
        assert batches.active[0] <= 4 < batches.active[1]
        one, other = (np.asarray(t.topk_ids).reshape(-1, 6) for t in (batches.alike, batches.drawn))
        assert np.array_equal(one[np.lexsort(one.T)], other[np.lexsort(other.T)])
        steps = ids.swapaxes(0, 1)
        asked = np.mean([len(np.unique(step[:, layer])) for step in steps for layer in range(3)])
        assert batches.active[0] == pytest.approx(asked)


def test_who_fills_no_batch_is_left_out() -> None:
    """Groups are disjoint, and of full size."""
    profiles = np.eye(7)[[0, 1, 0, 1, 0, 1, 2]]
    groups = group_alike(profiles, 3)
    assert groups.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert group_alike(profiles[:2], 3).shape == (0, 3)


def test_what_cannot_be_batched_is_named() -> None:
    """No sequences; too few that are long enough; nothing to serve."""
    trace = families(0, requests=6, tokens=FIRST + 4)
    with pytest.raises(InputError, match="which sequence a token is of"):
        batch_alike(trace.replace(sequence_ids=None), batch=2, steps=4)
    with pytest.raises(InputError, match=r"0 sequences have 16 \+ 5 tokens, two batches of 2 need 4"):
        batch_alike(trace, batch=2, steps=5)
    for steps in (0, -1, -FIRST, -FIRST - 1):
        with pytest.raises(InputError, match=rf"are served \({steps}\) must be at least 1"):
            batch_alike(trace, batch=2, steps=steps)
