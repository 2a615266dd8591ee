"""TokenAttention: the attention of one new token per sequence, in a third of the operator calls of the module's own.

One product makes queries, keys and values; query heads that share keys are queries of one attention, so that nothing is
repeated; the residual is added by the last product. It is taken where a layer's attention has these parts and no
others, and gives what the module gives on tokens that are tried.

Shape letters: M tokens, D hidden size, H query heads, G key heads, d head size, P positions.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_PROBE_TOKENS, _PROBE_POSITIONS = 3, 6
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_COARSE = 2e-2
"""For 16-bit types."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines, and sines whose first half is negated: (M, 1, d) each."""
SeenKv = tuple[torch.Tensor, torch.Tensor]
"""Keys and values that tokens see: (tokens, G, P, d) each."""


class OneTokenView(Protocol):
    """What it needs of a view of one token per sequence; see `AttentionView`."""

    @property
    def rotation(self) -> Rotation | None:
        """Of the tokens' positions."""

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        """(M, 1, 1, P) mask, or None where every key is seen."""

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        """Keep new keys and values (M, G, d) of a layer; all that the tokens see, of some tokens after the other."""


class TokenAttention:
    """See the module."""

    def __init__(self, module: Any, head_size: int) -> None:
        """Join the projections of a module, whose parameters become views of what is joined.

        Raises:
            AttributeError: it has no such parts.
        """
        query, key, value, out = (getattr(module, name) for name in _PROJECTIONS)
        self._widths = [layer.out_features for layer in (query, key, value)]
        self._weight = _join([layer.weight for layer in (query, key, value)]).t()  # (D, H d + 2 G d)
        biases = [layer.bias for layer in (query, key, value)]
        self._bias = None if biases[0] is None else _join(biases)
        self._out, self._out_bias = out.weight.data.t(), None if out.bias is None else out.bias.data
        self._norms = [getattr(module, name, None) for name in _NORMS]
        self._size, self._scaling = head_size, float(module.scaling)

    def __call__(
        self, layer: int, x: torch.Tensor, hidden: torch.Tensor, view: OneTokenView, *, window: int | None
    ) -> torch.Tensor:
        """Residual stream (M, D) after attention to normalised rows `hidden` (M, D)."""
        joined = torch.mm(hidden, self._weight) if self._bias is None else torch.addmm(self._bias, hidden, self._weight)
        query, key, value = joined.split(self._widths, 1)
        assert view.rotation is not None
        query = _rotate(self._heads(query, self._norms[0]), view.rotation)
        key = _rotate(self._heads(key, self._norms[1]), view.rotation)
        seen = view.store(layer, key, value.unflatten(1, (-1, self._size)))
        # Head h shares keys with those that have the same h // (H / G): they are the queries of one attention.
        folded = query.view(len(x), key.shape[1], -1, self._size)
        out = attend_to(folded, seen, mask=view.mask(window, additive=None), scale=self._scaling)
        base = x if self._out_bias is None else x + self._out_bias
        return torch.addmm(base, out.reshape(len(x), -1), self._out)

    def _heads(self, rows: torch.Tensor, norm: Any) -> torch.Tensor:
        """(M, heads, d) of (M, heads d), normalised as a whole or head by head."""
        if norm is not None and norm.weight.numel() != self._size:
            rows = norm(rows)
            norm = None
        heads = rows.view(len(rows), -1, self._size)
        return heads if norm is None else norm(heads)


def attend_to(query: torch.Tensor, seen: Sequence[SeenKv], *, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(M, G, Q, d) what queries of tokens find in what these see, piece by piece of the tokens.

    Args:
        query: (M, G, Q, d).
        seen: of all tokens, in their order.
        mask: (M, 1, 1, P), None = every key counts.
    """
    if len(seen) == 1:
        keys, values = seen[0]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    sizes = [len(keys) for keys, _ in seen]
    masks = [None] * len(seen) if mask is None else mask.split(sizes)
    pieces = zip(query.split(sizes), seen, masks, strict=True)
    return torch.cat([attend_to(part, [pair], mask=own, scale=scale) for part, pair, own in pieces])


def rotation_of(position_embeddings: Any) -> Rotation | None:
    """From what attention modules want to know of positions, (M, 1, d) cosines and sines; None = it is no such pair."""
    if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
        return None
    cosine, sine = position_embeddings
    if cosine.shape != sine.shape or cosine.ndim != 3 or cosine.shape[1] != 1 or cosine.shape[2] % 2:
        return None
    signed = sine.clone()
    signed[..., : sine.shape[2] // 2].neg_()
    return cosine, signed


@torch.inference_mode()
def find_token_attention(
    module: Any, position_embeddings: Any, *, layer: int, dtype: torch.dtype, width: int, cache_keyword: str
) -> TokenAttention | None:
    """The quick form of an attention module, None = it is another one.

    Args:
        position_embeddings: of `_PROBE_TOKENS` tokens at position `_PROBE_POSITIONS` - 1.
        layer: number of its decoder layer.
        width: D.
        cache_keyword: under which it takes the view that it writes to.
    """
    rotation = rotation_of(position_embeddings)
    if rotation is None or not _has_the_parts(module):
        return None
    size = rotation[0].shape[2]
    heads = [getattr(module, name).out_features / size for name in _PROJECTIONS[:3]]
    if heads[1] != heads[2] or any(count != int(count) for count in heads) or heads[0] % heads[1]:
        return None
    quick = TokenAttention(module, size)
    generator = torch.Generator().manual_seed(0)
    device = rotation[0].device
    x = torch.randn(_PROBE_TOKENS, width, generator=generator).to(device, dtype)
    for masked in (False, True):
        views = [_TriedView(position_embeddings, rotation, int(heads[1]), dtype, masked=masked) for _ in range(2)]
        given = quick(layer, torch.zeros_like(x), x, views[0], window=None)
        try:
            expected, *_ = module(
                hidden_states=x.unsqueeze(1),
                position_embeddings=position_embeddings,
                attention_mask=views[1].mask(None, additive=None),
                **{cache_keyword: views[1]},
            )
        except Exception:  # whatever a foreign module wants, it is not that
            return None
        if not _is_close(given, expected.squeeze(1)):
            return None
    return quick


def tried_positions(device: torch.device) -> torch.Tensor:
    """(M, 1) positions for `find_token_attention`."""
    return torch.full((_PROBE_TOKENS, 1), _PROBE_POSITIONS - 1, device=device)


def _has_the_parts(module: Any) -> bool:
    """Whether a module's parameters are those of the projections and norms, and no others."""
    parts = dict(module.named_children())
    projections = [parts.pop(name, None) for name in _PROJECTIONS]
    if not all(isinstance(layer, nn.Linear) for layer in projections) or not isinstance(
        getattr(module, "scaling", None), float
    ):
        return False
    if len({layer.bias is None for layer in projections[:3]}) > 1:  # type: ignore[union-attr]
        return False
    norms = [parts.pop(name) for name in _NORMS if name in parts]
    known = sum(len(list(layer.parameters())) for layer in (*projections, *norms))  # type: ignore[union-attr]
    return len(norms) in (0, 2) and known == len(list(module.parameters()))


def _join(tensors: list[Any]) -> torch.Tensor:
    """Parameters in one tensor, of which they become views: no memory is taken twice."""
    joined = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return joined


def _rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """(M, heads, d) with both halves of each head turned."""
    cosine, signed_sine = rotation
    swapped = heads.unflatten(2, (2, -1)).flip(2).flatten(2)
    return torch.addcmul(heads * cosine, swapped, signed_sine)


def _is_close(given: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = _TOLERANCES.get(given.dtype, _COARSE)
    scale = expected.double().abs().max().clamp(min=1e-30)
    return bool((given.double() - expected.double()).abs().max() <= tolerance * scale)


class _TriedView:
    """Tokens with the same made-up keys and values before them; see `AttentionView`."""

    def __init__(
        self, position_embeddings: Any, rotation: Rotation, heads: int, dtype: torch.dtype, *, masked: bool
    ) -> None:
        device, size = rotation[0].device, rotation[0].shape[2]
        generator = torch.Generator().manual_seed(1)
        shape = (2, _PROBE_TOKENS, heads, _PROBE_POSITIONS, size)
        self._keys, self._values = torch.randn(shape, generator=generator).to(device, dtype)
        self.position_embeddings, self.rotation, self._masked = position_embeddings, rotation, masked

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        if not self._masked:
            return None
        first = torch.arange(_PROBE_TOKENS, device=self._keys.device)[:, None]
        return (torch.arange(_PROBE_POSITIONS, device=first.device) >= first)[:, None, None]

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        self._keys[:, :, -1], self._values[:, :, -1] = key, value
        return [(self._keys, self._values)]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.store(layer, key[:, :, 0], value[:, :, 0])[0]
