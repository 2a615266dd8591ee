"""WholeModel: a model of `transformers` that runs its own code from end to end; only its experts are elsewhere.

Whatever a family does between its MoE layers (linear attention, state space layers, sparse attention, sandwich norms,
two MoE parts per layer, ...) it does here as in `transformers`, one sequence at a time and with its own cache object,
so nothing needs to be known of it. What the runtime needs is where the experts are called.

Shape letters: n tokens of a sequence, M tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch

from moeplace.profiling.recording.cache_names import cache_keyword, cache_of
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.loading import taps_of
from moeplace.runtime.models.lock_step import TapCall, pause_at_tap
from moeplace.runtime.models.opened_model import OpenedModel


class WholeModel(OpenedModel):
    """See the module.

    Attributes:
        num_layers: decoder layers.
        reason: why it is not cut at its MoE layers, so that it cannot serve in mode coherent.
        family: its model type.
        calls: of the experts in one pass, in order.
        state_bytes_per_position: what one more position of a sequence takes over all layers.
        fixed_state_bytes: what a sequence takes whatever its length: recurrent states.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        model: Any = None,
        reason: str = "asked for",
    ) -> None:
        """As `OpenedModel`, and learn from one pass how it calls its experts.

        Args:
            reason: why it is not cut at its MoE layers.

        Raises:
            FormatError: tensors are missing or have other shapes.
            InputError: the family's own code does more around its language model than the engine can follow.
        """
        super().__init__(checkpoint, dtype=dtype, device=device, model=model)
        self.reason, self.num_layers = reason, checkpoint.num_hidden_layers
        self._cache_keyword = cache_keyword(self._base.forward)
        self.family = checkpoint.family.name
        self.calls, self.state_bytes_per_position, self.fixed_state_bytes = self._probe(checkpoint)
        for tap in taps_of(self._model):
            tap.sum_experts = pause_at_tap

    def forward(self, ids: list[int], state: Any) -> tuple[torch.Tensor, Any]:
        """Run tokens of one sequence after those that `state` has seen (None = the first).

        Returns:
            (n, D) rows from which `logits` makes logits, and the state after them.
        """
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        out = self._base(input_ids=tokens, use_cache=True, **{self._cache_keyword: state})
        return out.last_hidden_state[0], cache_of(out)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, V), by the family's own code behind its language model."""
        return self._head.logits(x)

    @torch.inference_mode()
    def _probe(self, checkpoint: Checkpoint) -> tuple[list[TapCall], int, int]:
        """What one pass calls, alike for prompts and single tokens; and what a position takes."""
        made: list[TapCall] = []

        def note(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            made.append(TapCall.of(layer, hidden, ids, weights))
            return torch.zeros_like(hidden)

        for tap in taps_of(self._model):
            tap.sum_experts = note
        tokens = [(index * 7 + 1) % self.vocabulary for index in range(4)]
        _, state = self.forward(tokens[:3], None)
        first, made = made, []
        before = _state_bytes(state)
        _, state = self.forward(tokens[3:], state)
        if made != first:
            raise checkpoint.family.refusal("its prompts call other experts modules than its single tokens")
        size = _state_bytes(state) - before
        whole = self._model(input_ids=torch.tensor([tokens], device=self.device), use_cache=False).logits[0]
        x, _ = self.forward(tokens, None)
        if not torch.allclose(self.logits(x), whole, rtol=1e-3, atol=1e-5):
            raise checkpoint.family.refusal("its logits are not made of the last hidden state alone")
        return first, size, max(before - 3 * size, 0)


def _state_bytes(state: Any) -> int:
    """Bytes of all tensors in a cache."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            visit(list(value.values()))

    for layer in getattr(state, "layers", [state]):
        visit(vars(layer))
    return sum(seen.values())
