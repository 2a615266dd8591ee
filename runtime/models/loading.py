"""A model of `transformers` with everything but its routed experts read from a checkpoint.

`from_pretrained` does the reading, names and number types included; of the tensors of routed experts it is not told.
"""

import warnings
from typing import Any

import torch

from moeplace.profiling.errors import FormatError
from moeplace.profiling.recording.plain_model import plain_config
from moeplace.runtime.models.adapters import put_tap
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.family import Family
from moeplace.runtime.models.tap import ExpertsTap


def load_without_experts(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, in evaluation mode, with an `ExpertsTap` in place of each experts module.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    family = checkpoint.family
    checkpoint.check_shapes()
    lazy = {name: checkpoint.stored.slice_of(name) for name in checkpoint.other_names()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = _without_experts(family).from_pretrained(
            None,
            config=plain_config(family.model.config),
            state_dict=lazy,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, in our own words
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise FormatError(f"{checkpoint.path} lacks the tensor {missing[0]}")
    return model.eval().requires_grad_(False).to(device)


def taps_of(model: Any) -> list[ExpertsTap]:
    """The taps of a model, by MoE layer."""
    return [module for module in model.modules() if isinstance(module, ExpertsTap)]


def _without_experts(family: Family) -> Any:
    """The family's class, with a constructor that takes the experts out again before they get memory."""
    plain = type(family.model)

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        for layer, form in enumerate(family.forms):
            put_tap(self, form.experts, ExpertsTap(layer, form.experts))

    # Name and module stay: `transformers` looks up its tables by them.
    return type(plain.__name__, (plain,), {"__init__": construct, "__module__": plain.__module__})


def stated_dtype(family: Family) -> torch.dtype:
    """The number type that a configuration names, else float32."""
    dtype = getattr(family.config, "dtype", None) or getattr(family.text_config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
