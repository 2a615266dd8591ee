"""Verification: one short pass of an engine compared with the plain model that `transformers` builds.

A family that no recorded test has served may differ in ways that no error shows; so it is asked, once, at the start.
Rank 0 loads the whole plain model for it, experts included, and lets it go again.

Shape letters: n tokens of a sequence, V vocabulary.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.plain_model import load_plain_model
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.models.recorded import recorded_passes

logger = logging.getLogger(__name__)

_SHAPES = ((1, 1), (6, 2), (24, 19))
"""Length and prompt length of each sequence: masks of several lengths, and single tokens after a prompt."""
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 2e-3}
_FAILED = 1 << 20
_COARSE, _COARSE_SHARE = 0.1, 0.75
"""Of 16-bit types: how far a position may be off, and how many must not be; near-ties of routers may fall otherwise."""


def needs_verification(family: str) -> bool:
    """Whether no recorded pass vouches for a family."""
    return not recorded_passes().get(family)


def verify_engine(engine: Engine) -> None:
    """Compare the logits of a few short sequences with the plain model's: a collective, before requests come.

    Raises:
        InputError: they differ, on every rank.
    """
    positions = engine.scheduler.positions
    shapes = [(min(length, positions), min(prompt, positions)) for length, prompt in _SHAPES]
    vocabulary = engine.executor.decoder.vocabulary
    sequences = [[(5 + 11 * seed + 7 * index) % vocabulary for index in range(n)] for seed, (n, _) in enumerate(shapes)]
    served = engine.score(sequences, prompt_lengths=[prompt for _, prompt in shapes])
    verdict = torch.zeros(1, dtype=torch.int64, device=engine.group.device)
    if engine.group.rank == 0:
        verdict[0] = _count_differing(engine, sequences, served)
    if engine.group.size > 1:
        engine.group.all_reduce(verdict, kind="verification")
    if differing := int(verdict.item()):
        reason = (
            "its plain model cannot be run beside the engine; --no-verify serves without a comparison"
            if differing == _FAILED
            else f"the logits of {differing} of {len(sequences)} test sequences are not those of the plain model"
        )
        raise InputError(f"family {engine.checkpoint.model_type} is not supported (because {reason})")
    engine.group.counters.reset()


def _count_differing(engine: Engine, sequences: Sequence[Sequence[int]], served: Sequence[torch.Tensor]) -> int:
    """Sequences whose logits are not the plain model's; _FAILED where that cannot be asked: other ranks must hear."""
    checkpoint = engine.checkpoint
    try:
        plain = plain_logits(checkpoint.path, checkpoint.family.config, sequences, dtype=engine.executor.decoder.dtype)
    except Exception as error:  # memory, or anything in foreign code
        logger.warning("the plain model cannot be run: %s: %s", type(error).__name__, error)
        return _FAILED
    return sum(not _agree(*pair) for pair in zip(served, plain, strict=True))


@torch.inference_mode()
def plain_logits(
    folder: Path, config: Any, sequences: Sequence[Sequence[int]], *, dtype: torch.dtype
) -> list[torch.Tensor]:
    """(n, V) of the plain model per sequence, one at a time and without a cache."""
    model, _ = load_plain_model(folder, config, dtype=dtype, experts_implementation="eager")
    model.eval()
    return [model(input_ids=torch.tensor([list(s)]), use_cache=False).logits[0] for s in sequences]


def _agree(served: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether two (n, V) logits are the same but for rounding."""
    tolerance = _TOLERANCES.get(plain.dtype, _COARSE)
    served, plain = served.double().cpu(), plain.double()
    scale = plain.abs().amax(1).clamp(min=1e-6)
    close_n = (served - plain).abs().amax(1) <= tolerance * scale
    return bool(close_n.all() if tolerance < _COARSE else close_n.double().mean() >= _COARSE_SHARE)
