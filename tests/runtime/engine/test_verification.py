"""Verification at the start: what differs from the plain model stops, whatever makes it differ."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine import verification
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.verification import needs_verification, verify_engine
from moeplace.runtime.models.recorded import recorded_families
from tests.runtime.checkpoints import FAMILIES, save_checkpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_is_served_exactly_passes(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """In every number type, and nothing of it is left in counters or rows."""
    save_checkpoint(family, tmp_path)
    engine = Engine(tmp_path, mode="dispatch-combine", dtype=dtype)
    verify_engine(engine)
    assert engine.scheduler.is_idle
    assert engine.counters()["steps"] == 0


def spoil_activation(engine: Engine) -> None:
    computation: Any = engine.executor.runtime.computation
    plain = computation._activation
    computation._activation = lambda x: 1.1 * plain(x)


def spoil_expert(engine: Engine) -> None:
    for weights in engine.executor.runtime.experts.weights:
        weights.down[0].mul_(1.5)


def spoil_positions(engine: Engine) -> None:
    decoder: Any = engine.executor.decoder
    plain = decoder.position_embeddings
    decoder.position_embeddings = lambda positions: plain(positions + positions // 6)


@pytest.mark.parametrize("spoil", [spoil_activation, spoil_expert, spoil_positions])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_differs_is_refused(tmp_path: Path, spoil: Any, dtype: torch.dtype) -> None:
    """Another activation, one expert that was read wrongly, positions that go wrong only beyond the first few."""
    save_checkpoint("qwen3_moe", tmp_path)
    engine = Engine(tmp_path, mode="dispatch-combine", dtype=dtype)
    spoil(engine)
    with pytest.raises(InputError, match=r"family qwen3_moe is not supported \(because the logits of"):
        verify_engine(engine)


def test_a_plain_model_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the comparison cannot be made, nothing is served in silence; the sentence says how to do without."""

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("too large")

    save_checkpoint("olmoe", tmp_path)
    monkeypatch.setattr(verification, "plain_logits", fail)
    with pytest.raises(InputError, match="cannot be run beside the engine; --no-verify"):
        verify_engine(Engine(tmp_path, mode="dispatch-combine"))


def test_recorded_families_need_no_verification() -> None:
    """Those that the suite compares in every mode are recorded; a family that nobody knows is not."""
    assert set(FAMILIES) <= set(recorded_families())
    assert not any(map(needs_verification, FAMILIES))
    assert needs_verification("a_family_to_come")
