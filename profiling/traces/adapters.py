"""Adapters with experts of their own: (layer, expert, adapter) as an expert index, for solver and evaluation.

Several adapters over one base share attention and, as a rule, most experts; where an adapter has its own weights for an
expert, that is one more thing to place, with its own load, affinity and bytes. A trace keeps the base's ids and the
adapter of each token; `separate_adapters` renumbers, so that everything downstream needs no idea of adapters.

Shape letters: T tokens, L MoE layers, E experts per layer, A adapters.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import BASE_MODEL, RoutingTrace


@dataclass(frozen=True, eq=False)
class ExpertKeys:
    """What each expert of a renumbered trace is: the base's experts first, then by adapter and base expert.

    Attributes:
        base_LE: (L, E') int64, expert of the base; -1 beyond a layer's own.
        adapter_LE: (L, E') int64, adapter whose weights these are, BASE_MODEL (-1) = those of the base.
    """

    base_LE: np.ndarray
    adapter_LE: np.ndarray


def used_by_adapters(trace: RoutingTrace) -> np.ndarray:
    """(A, L, E) bool: the experts that at least one token of each adapter was routed to.

    Raises:
        InputError: the trace does not say which adapter served a token.
    """
    if trace.adapter is None:
        raise InputError("the trace does not say which adapter served each token: it has no array `adapter`")
    used_ALE = np.zeros((len(trace.adapter_names), trace.num_layers, trace.num_experts), dtype=bool)
    for adapter in range(len(trace.adapter_names)):
        rows_T = np.flatnonzero(trace.adapter == adapter)
        for layer in range(trace.num_layers):
            ids = np.unique(trace.layer(layer)[rows_T])
            used_ALE[adapter, layer, ids[ids >= 0]] = True
    return used_ALE


def separate_adapters(trace: RoutingTrace, owned_ALE: np.ndarray | None = None) -> tuple[RoutingTrace, ExpertKeys]:
    """The trace with every (expert, adapter) that has weights of its own as an expert of its own.

    Args:
        trace: says which adapter served each token.
        owned_ALE: (A, L, E) bool, which experts each adapter has its own weights for; None = all that its tokens used.

    Returns:
        the trace, with more experts per layer (their number may differ from layer to layer), bytes of the base's
        experts repeated; and what its experts are.

    Raises:
        InputError: the trace does not say which adapter served a token, or `owned_ALE` does not fit it.
    """
    used_ALE = used_by_adapters(trace)
    owned_ALE = used_ALE if owned_ALE is None else np.asarray(owned_ALE, dtype=bool)
    if owned_ALE.shape != used_ALE.shape:
        raise InputError(f"owned experts must have shape {used_ALE.shape} (adapters, layers, experts)")
    beyond_LE = np.arange(trace.num_experts) >= trace.experts_per_layer[:, None]
    if (owned_ALE & beyond_LE).any():
        adapter, layer, expert = np.argwhere(owned_ALE & beyond_LE)[0].tolist()
        raise InputError(
            f"adapter {trace.adapter_names[adapter]!r} cannot own expert {expert} of MoE layer {layer}, "
            f"which has {trace.experts_per_layer[layer]}"
        )
    experts_L = trace.experts_per_layer + owned_ALE.sum(axis=(0, 2))
    keys = _keys(trace, owned_ALE, experts_L)
    assert trace.adapter is not None
    adapter_T = np.asarray(trace.adapter, dtype=np.int64)
    ids_TLK = trace.topk_ids.astype(np.int32)
    for layer, experts in enumerate(trace.experts_per_layer.tolist()):
        number_AE = np.arange(experts + trace.null_experts + 1) * np.ones((len(owned_ALE) + 1, 1), np.int64)
        number_AE[:, experts:-1] += experts_L[layer] - experts  # null experts stay beyond all others
        number_AE[:, -1] = -1  # for the id -1
        own = np.flatnonzero(keys.adapter_LE[layer] >= 0)
        number_AE[keys.adapter_LE[layer, own], keys.base_LE[layer, own]] = own
        ids_TLK[:, layer] = number_AE[adapter_T[:, None], ids_TLK[:, layer]]
    size_LE = trace.expert_bytes
    if size_LE is not None:
        size_LE = np.where(keys.base_LE >= 0, np.take_along_axis(size_LE, np.maximum(keys.base_LE, 0), axis=1), 0)
    note = f"{int(owned_ALE.sum())} experts of {len(owned_ALE)} adapters numbered after those of the base"
    changed = trace.replace(
        topk_ids=ids_TLK, experts_per_layer=experts_L, expert_bytes=size_LE, notes=(*trace.notes, note)
    )
    return changed, keys


def _keys(trace: RoutingTrace, owned_ALE: np.ndarray, experts_L: np.ndarray) -> ExpertKeys:
    shape = (trace.num_layers, int(experts_L.max()))
    base_LE, adapter_LE = np.full(shape, -1), np.full(shape, BASE_MODEL)
    for layer, experts in enumerate(trace.experts_per_layer.tolist()):
        adapters, own = np.nonzero(owned_ALE[:, layer])
        base_LE[layer, : experts + len(own)] = np.concatenate([np.arange(experts), own])
        adapter_LE[layer, experts : experts + len(own)] = adapters
    return ExpertKeys(base_LE, adapter_LE)
