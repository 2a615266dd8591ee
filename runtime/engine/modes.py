"""Which execution mode serves a pass, and why.

The modes are fixed by the user, taken from the placement file, or chosen per phase and batch size from predictions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import cluster_of, evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import MODES, Mode, Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace

PREDICTION_TOKENS = 8192
"""Tokens of a trace that a prediction replays: enough for a mean, little enough to do while serving."""

Phase = Literal["prefill", "decode"]
Predictor = Callable[[Mode, Phase, int], float]
"""(mode, phase, tokens of the batch) -> predicted seconds of the pass."""


@dataclass(frozen=True)
class ModeChoice:
    """A mode and the reason for it, a sentence."""

    mode: Mode
    reason: str


class ModeRule(Protocol):
    """How modes are chosen; must give the same answer on every rank."""

    def choose(self, phase: Phase, num_tokens: int) -> ModeChoice:
        """The mode of a pass over `num_tokens` tokens."""

    @property
    def may_be_coherent(self) -> bool:
        """Whether any pass may be coherent, so that K/V need room on every rank."""


@dataclass(frozen=True)
class FixedMode:
    """Always the same mode; prefill of `coherent` runs as dispatch-combine, because coherent is exact for decoding."""

    mode: Mode
    reason: str

    def choose(self, phase: Phase, num_tokens: int) -> ModeChoice:
        """See `ModeRule`."""
        if phase == "prefill" and self.mode == "coherent":
            return ModeChoice("dispatch-combine", "coherent serves decoding; prefill is data-parallel")
        return ModeChoice(self.mode, self.reason)

    @property
    def may_be_coherent(self) -> bool:
        return self.mode == "coherent"


@dataclass(frozen=True)
class PredictedMode:
    """The mode of least predicted seconds."""

    predict: Predictor

    def choose(self, phase: Phase, num_tokens: int) -> ModeChoice:
        """See `ModeRule`."""
        modes = [mode for mode in MODES if mode != "coherent" or phase == "decode"]
        seconds: Mapping[Mode, float] = {mode: self.predict(mode, phase, num_tokens) for mode in modes}
        best = min(modes, key=seconds.__getitem__)
        listed = ", ".join(f"{mode} {1e3 * seconds[mode]:.3g} ms" for mode in modes)
        return ModeChoice(best, f"least predicted time of a {phase} pass over {num_tokens} tokens: {listed}")

    @property
    def may_be_coherent(self) -> bool:
        return True


@dataclass(frozen=True)
class TracePredictor:
    """A `Predictor` that replays recorded routing through the cost model, once per mode and power of two of tokens.

    Attributes:
        trace: routing to expect.
        placement: the placement in force.
        calibration: measured links and expert time; None = nominal ones.
        shape: hidden size, number type and K/V width of the model.
    """

    trace: RoutingTrace
    placement: Placement
    calibration: Calibration | None
    shape: StepShape
    _known: dict[tuple[Mode, int], float] = field(default_factory=dict)

    def __call__(self, mode: Mode, phase: Phase, num_tokens: int) -> float:
        """Predicted seconds of the MoE layers of a pass."""
        batch = 1 << max(num_tokens - 1, 0).bit_length()
        if (mode, batch) not in self._known:
            cluster = cluster_of(self.placement)
            evaluation = evaluate(
                self.trace.select(slice(0, PREDICTION_TOKENS)),
                self.placement,
                mode=mode,
                cluster=cluster if self.calibration is None else self.calibration.apply(cluster),
                shape=StepShape(batch, self.shape.hidden_size, self.shape.dtype_bytes, self.shape.kv_dim),
                calibration=self.calibration,
            )
            self._known[mode, batch] = evaluation.predicted_seconds
        return self._known[mode, batch]


def choose_mode_rule(mode: str, placement: Placement, predictor: Predictor | None = None) -> ModeRule:
    """The rule behind `--mode`: a mode by name, or `auto`.

    `auto` uses predictions where there are any, else the mode that the placement was made for.

    Raises:
        InputError: there is no such mode.
    """
    if mode == "auto":
        if predictor is not None:
            return PredictedMode(predictor)
        return FixedMode(placement.mode, "the placement was made for it")
    if mode not in MODES:
        raise InputError(f"mode {mode!r} must be auto or one of {', '.join(MODES)}")
    return FixedMode(mode, "asked for")
