"""Whether a model may be cut at its MoE layers: every layer is run whole and in parts, and must give the same.

The experts themselves play no role in it: both runs have a function in their place that depends smoothly on what the
router decided, so that rounding cannot turn a comparison around. Windows of attention are made short for the while.

Shape letters: Q tokens of a sequence, D hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moeplace.runtime.models.blocks import ModelBlock, NotSplitError
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.head import language_model
from moeplace.runtime.models.loading import taps_of
from moeplace.runtime.models.token_attention import SeenKv

_LENGTHS = (1, 9)
_SHORT_WINDOW = 4
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 5e-2
"""For 16-bit types."""


class _LayerPass(NamedTuple):
    """A decoder layer of the whole model in one pass."""

    before: torch.Tensor  # (Q, D)
    after: torch.Tensor  # (Q, D)


@torch.inference_mode()
def check_split(model: Any, decoder: Decoder) -> None:
    """Compare a model with its parts, layer by layer, for prompts of several lengths.

    Raises:
        NotSplitError: they differ, or a part cannot be called alone.
    """
    for tap in taps_of(model):
        tap.sum_experts = _stand_in
    windows, stated = decoder.windows, getattr(decoder.config, "sliding_window", None)
    configs = [config for config in (decoder.config, model.config) if getattr(config, "sliding_window", None)]
    try:
        for config in configs:
            config.sliding_window = _SHORT_WINDOW
        decoder.windows = [None if window is None else _SHORT_WINDOW for window in windows]
        for length in _LENGTHS:
            _compare(model, decoder, length)
    except NotSplitError:
        raise
    except Exception as error:  # a foreign module may want anything
        reason = " ".join(str(error).split())[:120]
        raise NotSplitError(f"its parts cannot be called alone ({type(error).__name__}: {reason})") from error
    finally:
        decoder.windows = windows
        for config in configs:
            config.sliding_window = stated


def _stand_in(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (hidden * weights.sum(1, keepdim=True)).to(hidden.dtype)


def _compare(model: Any, decoder: Decoder, length: int) -> None:
    ids = (torch.arange(length, device=decoder.device) * 7 + 3) % decoder.vocabulary
    passes, logits = _run_whole(model, decoder, ids)
    _require_close(decoder.embed(ids), passes[0].before, "its embeddings are changed before the first layer")
    view = _SequenceView(decoder, length)
    for layer, whole in enumerate(passes):
        x = decoder.attend(layer, whole.before, view)
        moe_layer = decoder.moe_index.get(layer)
        x = decoder.feed_forward(layer, x) if moe_layer is None else _through(decoder.blocks[moe_layer], x)
        _require_close(x - whole.before, whole.after - whole.before, f"decoder layer {layer} is more than its parts")
    if len(set(view.shapes)) > 1:
        raise NotSplitError("its layers keep keys and values of different shapes")
    _require_close(decoder.logits(passes[-1].after), logits, "its logits are not made of the last layer's output alone")


def _through(block: ModelBlock, x: torch.Tensor) -> torch.Tensor:
    hidden = block.normalise(x)
    ids, weights = block.route(hidden, torch.arange(len(x), device=x.device))
    routed, shared = _stand_in(0, hidden, ids, weights), block.shared(hidden)
    return x + (routed if shared is None else routed + shared)


def _run_whole(model: Any, decoder: Decoder, ids: torch.Tensor) -> tuple[list[_LayerPass], torch.Tensor]:
    layers = list(language_model(model).layers)
    passes: list[_LayerPass] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        passes.append(_LayerPass(before[0], after[0]))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    if len(passes) != decoder.num_layers:
        raise NotSplitError("its decoder layers do not run once each")
    return passes, logits


def _require_close(found: torch.Tensor, expected: torch.Tensor, reason: str) -> None:
    tolerance = _TOLERANCES.get(found.dtype, _COARSE)
    found, expected = found.double(), expected.double()
    scale = max(float(expected.abs().max()), 1e-30)
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= tolerance * scale:
        raise NotSplitError(reason)


class _SequenceView:
    """One prompt, whose keys and values nobody keeps; see `AttentionView`."""

    rotation = None

    def __init__(self, decoder: Decoder, length: int) -> None:
        index = torch.arange(length, device=decoder.device)
        self.position_embeddings = decoder.position_embeddings(index[None])
        self._behind = index[:, None] - index[None, :]
        self.shapes: list[tuple[int, ...]] = []

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        return x[0]

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        if window is None and additive is None:
            return None
        seen = ((self._behind >= 0) & (self._behind < (window or len(self._behind))))[None, None]
        if additive is None:
            return seen
        zeros = torch.zeros(seen.shape, dtype=additive, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(additive).min)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        raise AssertionError("a prompt is no single token")

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.shapes.append((key.shape[1], key.shape[3], value.shape[1], value.shape[3]))
        return key, value
