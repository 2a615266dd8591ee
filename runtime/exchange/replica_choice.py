"""Replica choice on tensors: the rule of `moeplace.placement.cost.replica_choice`, for a whole batch at once.

That module's docstring defines the rule; a test holds the two equal. The other rule is that of a `RunningLoad`.

Shape letters: T tokens, K top-k, R ranks.
"""

import torch

from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables


def choose_slots(
    tables: SlotTables,
    layer: int,
    ids: torch.Tensor,
    *,
    near: torch.Tensor | int,
    rotation: torch.Tensor,
    running: RunningLoad | None = None,
) -> torch.Tensor:
    """The global slot that serves each expert of each token.

    Args:
        tables: the placement.
        layer: MoE layer.
        ids: (T, K) int64 expert ids, -1 = none.
        near: (T,) rank where each token is (or one rank for all), -1 = unknown.
        rotation: (T,) int64, numbers that vary over tokens: their index in the step.
        running: the load so far, by which ties are split; None = by the table of orders. It counts these tokens in.

    Returns:
        (T, K) int64 global slots, -1 = none.
    """
    if not tables.replicated[layer]:
        return tables.first_slot[layer][ids]
    near_T = torch.as_tensor(near, device=ids.device, dtype=torch.int64).expand(len(ids))
    slot_TKR = torch.where(ids[..., None] >= 0, tables.slot_on_rank[layer][ids.clamp(min=0)], -1)
    if running is None:
        rank_TK = _choose_ranks(tables, slot_TKR >= 0, near_T, rotation)
    else:
        rank_TK = running.choose_ranks(tables, layer, slot_TKR >= 0, near_T, rotation)
    chosen_TK = slot_TKR.gather(2, rank_TK.clamp(min=0)[..., None]).squeeze(2)
    return torch.where(rank_TK >= 0, chosen_TK, -1)


def _choose_ranks(
    tables: SlotTables, held_TKR: torch.Tensor, near_T: torch.Tensor, rotation_T: torch.Tensor
) -> torch.Tensor:
    """(T, K) serving ranks, -1 = none."""
    _, top_k, ranks = held_TKR.shape
    index_R = torch.arange(ranks, device=held_TKR.device)
    order_TR = tables.preference[rotation_T % len(tables.preference)]  # 0 = first in the order of the rotation number
    is_near_TR = index_R == near_T[:, None]
    # Rule 1: experts with one slot decide which ranks are in use.
    single_TK = held_TKR.sum(2) == 1
    used_TR = (held_TKR & single_TK[..., None]).any(1)
    # Rule 2: a replica on a rank in use; near first, then by order.
    free_TKR = held_TKR & used_TR[:, None, :]
    preference_TR = torch.where(is_near_TR, -1, order_TR)
    best_TK = torch.where(free_TKR, preference_TR[:, None, :], ranks).argmin(2)
    rank_TK = torch.where(free_TKR.any(2), best_TK, -1)
    # Rule 3: greedily, the rank that holds most of what remains.
    node_TR = _same_node(tables, used_TR, near_T)
    for _ in range(min(top_k, ranks)):
        open_TKR = held_TKR & (rank_TK < 0)[..., None]
        count_TR = open_TKR.sum(1)
        score_TR = 4 * count_TR + 2 * is_near_TR.long() + node_TR.long()
        score_TR = torch.where(count_TR > 0, score_TR * ranks + ranks - 1 - order_TR, -1)
        best_T = score_TR.argmax(1)
        takes_TK = open_TKR.gather(2, best_T[:, None, None].expand(-1, top_k, 1)).squeeze(2)
        rank_TK = torch.where(takes_TK, best_T[:, None], rank_TK)
        node_TR = node_TR | ((tables.node_of_rank == tables.node_of_rank[best_T][:, None]) & takes_TK.any(1)[:, None])
    return rank_TK


def _same_node(tables: SlotTables, used_TR: torch.Tensor, near_T: torch.Tensor) -> torch.Tensor:
    """(T, R) whether a rank's node is in use or is near's."""
    node_R = tables.node_of_rank
    same_RR = (node_R[:, None] == node_R[None, :]).to(torch.float32)
    in_use_TR = (used_TR.to(torch.float32) @ same_RR) > 0
    near_node_T = torch.where(near_T >= 0, node_R[near_T.clamp(min=0)], -1)
    return in_use_TR | (node_R == near_node_T[:, None])
