"""Head: from last hidden states to logits, by the family's own code behind its language model.

That code may scale, clamp or mix; so it is not rebuilt but run, around a language model that only repeats what it is
given.

Shape letters: M tokens, D hidden size, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import nn


class Head:
    """The causal language model without its language model.

    Attributes:
        vocabulary: V.
        width: D.
        dtype: of logits, as seen last; some families make them in another type than the model's.
    """

    def __init__(self, model: Any) -> None:
        self._given = _Given()
        self.dtype: torch.dtype = model.dtype
        self._model = copy.copy(model)
        base = language_model(model)
        name = next(name for name, module in model.named_children() if module is base)
        self._model._modules = {**model._modules, name: self._given}
        self.width = int(model.get_output_embeddings().in_features)
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._out_features = int(model.get_output_embeddings().out_features)
        self._handle = base.register_forward_hook(self._take_form)

    def _take_form(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the first output of the language model, for its fields; the head looks at some of them."""
        self._given.form = output
        self._handle.remove()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, V)."""
        if not len(x):
            return x.new_zeros(0, self._out_features, dtype=self.dtype)
        self._given.hidden = x[None]
        ids = torch.zeros(1, len(x), dtype=torch.int64, device=x.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0]
        self.dtype = logits.dtype
        return logits


def language_model(model: Any) -> Any:
    """The part of a causal language model that makes hidden states: the one with the embeddings."""
    embeddings = model.get_input_embeddings()
    return next(m for m in model.children() if any(part is embeddings for part in m.modules()))


class _Given(nn.Module):
    """Stands for a language model whose output is known already."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.form: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        out = copy.copy(self.form) if self.form is not None else MoeModelOutputWithPast()
        out["last_hidden_state"] = self.hidden
        return out
