"""OpenedModel: a model without its routed experts, as both ways of running it have it: cut (`Decoder`) or whole.

Shape letters: V vocabulary, D hidden size.
"""

from typing import Any

import torch

from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.head import Head, language_model
from moeplace.runtime.models.loading import load_without_experts, stated_dtype

_ENDLESS = 1 << 20
"""Positions of a model whose configuration states no limit."""


class OpenedModel:
    """What a model is, apart from how it runs.

    Attributes:
        config: the configuration of the language model.
        dtype: of the hidden states.
        device: where it lives.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        model: Any = None,
    ) -> None:
        """Build the model and read everything but the routed experts.

        Args:
            model: the same, read already.

        Raises:
            FormatError: tensors are missing or have other shapes.
        """
        self.device = torch.device(device)
        self.dtype = dtype or stated_dtype(checkpoint.family)
        if model is None:
            model = load_without_experts(checkpoint, dtype=self.dtype, device=self.device)
        self._model, self.config = model, checkpoint.family.text_config
        self._base = language_model(model)
        self._head = Head(model)

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or _ENDLESS)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._head.vocabulary

    @property
    def logits_dtype(self) -> torch.dtype:
        """Number type of logits."""
        return self._head.dtype

    @property
    def hidden_size(self) -> int:
        """D: width of the rows of which logits are made."""
        return self._head.width
