"""Which execution mode serves a pass, and why.

The modes are fixed by the user, taken from the placement file, or chosen per phase and batch size from predictions.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, Self

import torch

from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import cluster_of, evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup

logger = logging.getLogger(__name__)

PREDICTION_TOKENS = 8192
"""Tokens of a trace that a prediction replays: enough for a mean, little enough to do while serving."""

Phase = Literal["prefill", "decode"]
Predictor = Callable[[Mode, Phase, int], float]
"""(mode, phase, tokens of the batch) -> predicted seconds of the pass."""


@dataclass(frozen=True, eq=False)
class RecordedRouting:
    """What `auto` predicts from.

    Attributes:
        trace: recorded routing, like that to expect.
        calibration: measured links and expert time; None = nominal ones.
    """

    trace: RoutingTrace
    calibration: Calibration | None = None

    @classmethod
    def load(cls, trace: str | Path, calibration: str | Path | None = None) -> Self:
        """From files.

        Raises:
            MoeplaceError: one is missing, or is none.
        """
        return cls(load_trace(trace), None if calibration is None else Calibration.load(calibration))


@dataclass(frozen=True)
class ModeChoice:
    """A mode and the reason for it, a sentence."""

    mode: Mode
    reason: str


class ModeRule(Protocol):
    """How modes are chosen. All but `PredictedMode` must give the same answer on every rank."""

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
    """The mode of least predicted seconds: of floats, in which ranks may differ, so that one of them must decide."""

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
class AtHome:
    """What `auto` is for a model whose tokens must stay at home: another rule's choice where it leaves them there."""

    rule: ModeRule

    def choose(self, phase: Phase, num_tokens: int) -> ModeChoice:
        """See `ModeRule`."""
        choice = self.rule.choose(phase, num_tokens)
        if choice.mode != "coherent":
            return choice
        return ModeChoice("dispatch-combine", "the model's layers cannot be cut, so its tokens stay at home")

    @property
    def may_be_coherent(self) -> bool:
        return False


@dataclass(frozen=True)
class TracePredictor:
    """A `Predictor` that replays recorded routing through the cost model, once per mode and power of two of tokens.

    Attributes:
        recorded: routing to expect.
        placement: the placement in force.
        shape: hidden size, number type and K/V width of the model.
    """

    recorded: RecordedRouting
    placement: Placement
    shape: StepShape
    _known: dict[tuple[Mode, int], float] = field(default_factory=dict)

    def __call__(self, mode: Mode, phase: Phase, num_tokens: int) -> float:
        """Predicted seconds of the MoE layers of a pass."""
        batch = batch_class(num_tokens)
        if (mode, batch) not in self._known:
            cluster, calibration = cluster_of(self.placement), self.recorded.calibration
            evaluation = evaluate(
                self.recorded.trace.select(slice(0, PREDICTION_TOKENS)),
                self.placement,
                mode=mode,
                cluster=cluster if calibration is None else calibration.apply(cluster),
                shape=StepShape(batch, self.shape.hidden_size, self.shape.dtype_bytes, self.shape.kv_dim),
                calibration=calibration,
            )
            self._known[mode, batch] = evaluation.predicted_seconds
        return self._known[mode, batch]


def batch_class(num_tokens: int) -> int:
    """The power of two that stands for a batch in predictions."""
    return 1 << max(num_tokens - 1, 0).bit_length()


def rule_for(rule: ModeRule, placement: Placement) -> ModeRule:
    """A rule as it is for another placement: what is predicted from recorded routing is predicted anew."""
    if isinstance(rule, AtHome):
        return AtHome(rule_for(rule.rule, placement))
    if isinstance(rule, PredictedMode) and isinstance(rule.predict, TracePredictor):
        return PredictedMode(replace(rule.predict, placement=placement, _known={}))
    return rule


class ModeChooser:
    """A rule as the ranks of a group carry it out, all of them alike; rank 0 tells the log.

    What was decided holds for a group and a placement: who joins must be asked with the others, and what was the best
    mode for one placement may not be for the next.
    """

    def __init__(self, rule: ModeRule, placement: Placement, group: RankGroup) -> None:
        self.rule = rule
        self._placement, self._group = placement, group
        self._decided: dict[tuple[Phase, int], Mode] = {}
        self._last: dict[Phase, Mode] = {}

    def follow(self, placement: Placement, group: RankGroup) -> None:
        """Choose for these from now on; on all ranks between the same two passes."""
        is_moved = placement is not self._placement and not placement.equals(self._placement)
        if is_moved:
            self.rule = rule_for(self.rule, placement)
        if is_moved or group is not self._group:
            self._decided.clear()
        self._placement, self._group = placement, group

    def choose(self, phase: Phase, num_tokens: int) -> Mode:
        """The mode of a pass. Predictions are rank 0's: the first time for a batch of a class, a small collective."""
        group = self._group
        rule = self.rule.rule if isinstance(self.rule, AtHome) else self.rule
        if not isinstance(rule, PredictedMode) or group.size == 1:
            return self._tell(phase, self.rule.choose(phase, num_tokens))
        key = phase, batch_class(num_tokens)
        if key not in self._decided:
            self._decided[key] = self._decide(phase, num_tokens)
        return self._decided[key]

    def _decide(self, phase: Phase, num_tokens: int) -> Mode:
        group = self._group
        number = torch.zeros(1, dtype=torch.int64, device=group.device)
        if group.rank == 0:
            number[0] = MODES.index(self._tell(phase, self.rule.choose(phase, num_tokens)))
        group.broadcast(number, root=0, kind="mode")
        decided = int(number.item())
        group.raise_if_lost()
        return MODES[decided]

    def _tell(self, phase: Phase, choice: ModeChoice) -> Mode:
        if self._last.get(phase) != choice.mode and self._group.rank == 0:
            logger.info("%s runs in mode %s: %s", phase, choice.mode, choice.reason)
        self._last[phase] = choice.mode
        return choice.mode


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
