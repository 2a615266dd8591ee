"""Experts in fewer bits: what the bits mean, what they take, and that measured errors are those of the layers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.experts.precision_meter import PrecisionMeter
from moeplace.runtime.experts.rounding import EXACT, HALF, precisions_below, rounded, stored_bytes
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint
from tests.runtime.checkpoints import make_oracle

SEQUENCES = [[3, 9, 27, 17, 51, 4], [8, 1, 30, 2]]


def test_what_bits_mean() -> None:
    """By hand: rows have scales of their own, zeros stay, the greatest is met; biases are left alone."""
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [14.0, 1.1, -0.9, 3.0]])
    parts = {"gate_up": weight, "down": weight.clone(), "down_bias": torch.tensor([0.123456])}
    found = rounded(parts, "int4")
    assert found["gate_up"].tolist() == [[7, -3, 0, 0], [0, 0, 0, 0], [14, 2, 0, 4]]
    assert torch.equal(found["down_bias"], parts["down_bias"])
    assert torch.equal(rounded(parts, EXACT)["down"], weight)
    finer = rounded(parts, "int8")["gate_up"]
    assert (finer - weight).abs().max() <= 14 / 127 / 2 + 14 * 2.0**-8
    assert torch.equal(rounded(parts, HALF)["down_bias"], parts["down_bias"].bfloat16().float())


def test_what_bits_take() -> None:
    """Packed integers, two bytes of scale a row, biases as they are."""
    parts = {"gate_up": torch.zeros(6, 5), "down": torch.zeros(5, 3), "gate_up_bias": torch.zeros(6)}
    assert stored_bytes(parts, EXACT) == 4 * (30 + 15 + 6)
    assert stored_bytes(parts, HALF) == 2 * (30 + 15 + 6)
    assert stored_bytes(parts, "int8") == 30 + 12 + 15 + 10 + 24
    assert stored_bytes(parts, "int4") == 15 + 12 + 8 + 10 + 24
    assert precisions_below(torch.bfloat16) == (EXACT, "int8", "int4")
    assert precisions_below(torch.float32) == (EXACT, HALF, "int8", "int4")


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_errors_are_those_of_the_layer(family: str, tmp_path: Path, dated_seed: int) -> None:
    """One expert rounded in a model of one pass: the first layer's output moves by what the meter says; logits of a
    plan that rounds nothing are the plain ones."""
    path = make_oracle(family, tmp_path).path
    checkpoint, limits = Checkpoint(path), EngineLimits(max_sequences=4, max_length=20, max_prefill_tokens=40)

    def engine_of(source: Checkpoint) -> Engine:
        return Engine(source, mode="allgather", dtype=torch.float64, limits=limits)

    def outputs(engine: Engine) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Logits, and what the first layer's experts put out."""
        first: list[torch.Tensor] = []
        computation = engine.executor.runtime.computation
        original = computation._compute_present

        def watched(layer: int, *rest: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = original(layer, *rest)  # type: ignore[arg-type]
            if not layer:
                first.append(out)
            return out

        computation._compute_present = watched  # type: ignore[assignment,method-assign]
        logits = engine.score(SEQUENCES, prompt_lengths=[len(s) for s in SEQUENCES])
        return logits, torch.cat(first)

    exact = engine_of(checkpoint)
    names = (EXACT, "int8", "int4")
    meter = PrecisionMeter(exact.executor.runtime.experts, exact.placement.slot_to_expert, names)
    exact.executor.runtime.computation.observer = meter
    logits, plain = outputs(exact)
    choice = np.zeros((checkpoint.num_layers, int(checkpoint.experts_per_layer.max())), np.int64)
    for e in (0, int(meter.spoiled_LEP[0, :, 2].argmax())):
        one = choice.copy()
        one[0, e] = 2
        _, moved = outputs(engine_of(RoundedCheckpoint(path, names, one)))
        assert float((moved - plain).square().sum()) == pytest.approx(meter.spoiled_LEP[0, e, 2], rel=1e-6, abs=1e-20)
    assert float(plain.square().sum()) == pytest.approx(meter.square_L[0], rel=1e-9)
    assert (meter.spoiled_LEP[:, :, 0] == 0).all()
    assert (meter.error_LEP[:, :, 1:] > 0).all()  # those of experts that nobody asked for too
    assert meter.error_LEP[:, :, 2].sum() > meter.error_LEP[:, :, 1].sum()
    nothing = RoundedCheckpoint(path, names, choice)
    for a, b in zip(outputs(engine_of(nothing))[0], logits, strict=True):
        assert torch.equal(a, b)
    assert len({nothing.fingerprint, checkpoint.fingerprint, RoundedCheckpoint(path, names, one).fingerprint}) == 3


def test_plans_for_other_models_are_refused(tmp_path: Path) -> None:
    """Layers and experts must fit, and precisions be known: before any expert is read."""
    path = make_oracle("olmoe", tmp_path).path
    with pytest.raises(InputError, match="the plan of precisions is for"):
        RoundedCheckpoint(path, (EXACT,), np.zeros((1, 1), np.int64))
    plain = Checkpoint(path)
    choice = np.zeros((plain.num_layers, int(plain.experts_per_layer.max())), np.int64)
    with pytest.raises(InputError, match="precision 'fp3' must be one of exact, bfloat16, int8, int4"):
        RoundedCheckpoint(path, (EXACT, "fp3"), choice)
