"""RunningLoad: what this rank has sent to every rank so far, and the replica choice that levels it, on tensors.

The rule is that of `moeplace.placement.cost.balanced_choice`, whose docstring defines it; a test holds the two equal.
No step of it depends on values that only the device knows, and what is kept is changed in place.

Shape letters: T tokens, L MoE layers, K top-k, R ranks.
"""

from dataclasses import dataclass
from typing import Self

import torch

from moeplace.placement.cost.balanced_choice import FRACTION_BITS, HORIZON, MULTIPLIER, UNIT
from moeplace.placement.cost.replica_rule import BALANCED
from moeplace.runtime.exchange.slot_tables import SlotTables


@dataclass(frozen=True, eq=False)
class RunningLoad:
    """The load so far.

    Attributes:
        carried_LR: (L, R) int64, in units of 1 / UNIT assignments.
    """

    carried_LR: torch.Tensor

    @classmethod
    def none(cls, tables: SlotTables) -> Self:
        """Before anything has been sent under a placement."""
        device = tables.rank_of_slot.device
        return cls(torch.zeros(tables.num_layers, tables.num_ranks, dtype=torch.int64, device=device))

    @classmethod
    def of_rule(cls, rule: str, tables: SlotTables) -> Self | None:
        """What the replica rule of that name, one of `OWN_RULES`, keeps: None where it keeps nothing."""
        return cls.none(tables) if rule == BALANCED.name else None

    def choose_ranks(
        self, tables: SlotTables, layer: int, held_TKR: torch.Tensor, near_T: torch.Tensor, number_T: torch.Tensor
    ) -> torch.Tensor:
        """(T, K) serving ranks of a batch, -1 where no rank holds the expert; takes note of what is sent.

        Args:
            tables: the placement.
            layer: MoE layer.
            held_TKR: (T, K, R) bool, which rank holds which expert of each token.
            near_T: (T,) rank where each token is, -1 = unknown.
            number_T: (T,) int64 index of each token in the step.
        """
        tokens, top_k, ranks = held_TKR.shape
        carried_R = self.carried_LR[layer]
        holders_TK = held_TKR.sum(2)
        single_TKR = held_TKR & (holders_TK == 1)[..., None]
        base_R = carried_R + UNIT * single_TKR.sum((0, 1))
        share = (UNIT * (holders_TK > 1).sum() + ranks - 1) // ranks
        draw_T = number_T * (2 * top_k)
        used_TR = _cover(tables, held_TKR, single_TKR.any(1), near_T, base_R, share, draw_T + top_k)
        draw_TK = draw_T[:, None] + torch.arange(top_k, device=draw_T.device)
        open_TKR = (held_TKR & used_TR[:, None, :]).reshape(-1, ranks)
        shared_TK = share_out(open_TKR, base_R, share, draw_TK.reshape(-1)).reshape(tokens, top_k)
        rank_TK = torch.where(holders_TK > 1, shared_TK, torch.where(holders_TK == 1, held_TKR.long().argmax(2), -1))
        sent_R = ((rank_TK[..., None] == torch.arange(ranks, device=rank_TK.device)).sum((0, 1))) * UNIT
        served = (holders_TK > 0).any(1).sum()
        carried_R.copy_((carried_R + sent_R) * HORIZON // (HORIZON + served))
        return rank_TK


def _cover(
    tables: SlotTables,
    held_TKR: torch.Tensor,
    used_TR: torch.Tensor,
    near_T: torch.Tensor,
    base_R: torch.Tensor,
    share: torch.Tensor,
    draw_T: torch.Tensor,
) -> torch.Tensor:
    """(T, R) bool, A of each token: `used_TR` and who joins (rule 2)."""
    _, top_k, ranks = held_TKR.shape
    index_R, node_R = torch.arange(ranks, device=held_TKR.device), tables.node_of_rank
    is_near_TR = index_R == near_T[:, None]
    same_RR = (node_R[:, None] == node_R[None, :]).to(torch.float32)
    node_TR = ((used_TR | is_near_TR).to(torch.float32) @ same_RR) > 0
    open_TKR = held_TKR & ~(held_TKR & used_TR[:, None, :]).any(2, keepdim=True)
    for joined in range(min(top_k, ranks)):
        count_TR = open_TKR.sum(1)
        score_TR = torch.where(count_TR > 0, 4 * count_TR + 2 * is_near_TR.long() + node_TR.long(), -1)
        tied_TR = (score_TR == score_TR.amax(1, keepdim=True)) & (count_TR > 0)
        best_T = share_out(tied_TR, base_R, share, draw_T + joined)
        joins_TR = (index_R == best_T[:, None]) & tied_TR
        used_TR = used_TR | joins_TR
        node_TR = node_TR | ((joins_TR.to(torch.float32) @ same_RR) > 0)
        open_TKR = open_TKR & ~(open_TKR & joins_TR[:, None, :]).any(2, keepdim=True)
    return used_TR


def share_out(tied_XR: torch.Tensor, base_R: torch.Tensor, share: torch.Tensor, draw_X: torch.Tensor) -> torch.Tensor:
    """(X,) rank that each draw takes of those tied, by their room; R - 1 where none is."""
    count_X1 = tied_XR.sum(1, keepdim=True)
    level_X1 = count_X1 * share + torch.where(tied_XR, base_R, 0).sum(1, keepdim=True)
    room_XR = torch.where(tied_XR, (level_X1 - count_X1 * base_R).clamp(min=0), 0)
    passed_XR = room_XR.cumsum(1)
    fraction_X1 = ((draw_X * MULTIPLIER & 0xFFFFFFFF) >> FRACTION_BITS)[:, None]
    before_XR = (passed_XR << FRACTION_BITS) <= fraction_X1 * passed_XR[:, -1:]
    return before_XR.sum(1).clamp(max=tied_XR.shape[1] - 1)
