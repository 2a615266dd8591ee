"""Opens the model of a checkpoint for serving: cut at its MoE layers where that is exact, else whole."""

import logging

import torch

from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.models.blocks import NotSplitError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.loading import load_without_experts, stated_dtype
from moeplace.runtime.models.splitting import check_split
from moeplace.runtime.models.whole import WholeModel

logger = logging.getLogger(__name__)

ServedModel = Decoder | WholeModel


def open_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ServedModel:
    """Everything of a checkpoint but its routed experts, ready to run.

    Raises:
        FormatError: tensors are missing or have other shapes.
        InputError: the family's code does what the engine cannot follow.
    """
    dtype, device = dtype or stated_dtype(checkpoint.family), torch.device(device)
    model = load_without_experts(checkpoint, dtype=dtype, device=device)
    try:
        decoder = Decoder(checkpoint, dtype=dtype, device=device, model=model)
        check_split(model, decoder)
    except NotSplitError as error:
        logger.info("%s runs its own code from end to end: %s", checkpoint.family.name, error)
        reason = str(error)
    else:
        decoder.quicken()
        return decoder
    try:
        return WholeModel(checkpoint, dtype=dtype, device=device, model=model, reason=reason)
    except MoeplaceError:
        raise
    except Exception as error:  # the family's own code may fail anywhere on a prompt of a few tokens
        sentence = " ".join(str(error).split())[:160]
        raise checkpoint.family.refusal(f"its own code fails: {type(error).__name__}: {sentence}") from error
