"""Who serves a token, who is to own it, and where rows go, worked out on the device: the host sees no value.

`host_counts` has the same rules on the host; a test holds them equal.

Shape letters: N rows, K top-k, R ranks, P places of a message.
"""

from typing import NamedTuple

import torch


def count_by_rank(rank_NK: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """(N, R) int64: experts of each token that each rank serves; -1 counts nowhere."""
    count_NR = torch.zeros(len(rank_NK), num_ranks + 1, dtype=torch.int64, device=rank_NK.device)
    column_NK = torch.where(rank_NK >= 0, rank_NK, num_ranks)
    return count_NR.scatter_add_(1, column_NK, torch.ones_like(column_NK))[:, :num_ranks]


def choose_owner(count_NR: torch.Tensor, before_N: torch.Tensor) -> torch.Tensor:
    """(N,) int64 new owner of each token, see `host_counts.choose_owner`."""
    ranks = count_NR.shape[1]
    index_R = torch.arange(ranks, device=count_NR.device)
    score_NR = (2 * count_NR + (index_R == before_N[:, None])) * ranks + (ranks - 1 - index_R)
    best_N = torch.where(count_NR > 0, score_NR, -1).argmax(1)
    return torch.where(count_NR.any(1), best_N, before_N)


def gateways_of(count_NR: torch.Tensor, nodes: tuple[slice, ...]) -> torch.Tensor:
    """(N, R) bool: the rank of each node that takes the copy of a token, see `host_counts.gateways_of`."""
    found_NR = torch.zeros_like(count_NR, dtype=torch.bool)
    for ranks in nodes:
        count_Nn = count_NR[:, ranks]
        index_n = torch.arange(count_Nn.shape[1], device=count_NR.device)
        # The first of equals: the lowest rank.
        score_Nn = count_Nn * count_Nn.shape[1] + (count_Nn.shape[1] - 1 - index_n)
        is_best_Nn = index_n == score_Nn.argmax(1, keepdim=True)
        found_NR[:, ranks] = is_best_Nn & (count_Nn > 0)
    return found_NR


class Packed(NamedTuple):
    """Rows in the places of messages."""

    source_P: torch.Tensor  # row in each place, N = none
    exceeded: torch.Tensor  # () bool: some message has more rows than places


def pack_messages(wanted_NR: torch.Tensor, starts_R: torch.Tensor, rooms_R: torch.Tensor, places: int) -> Packed:
    """Give every copy a place: in the message to its rank, in the order of rows.

    Args:
        wanted_NR: bool, who gets a copy of each row.
        starts_R: first place of each message.
        rooms_R: places of each message.
        places: of all messages.
    """
    rows = len(wanted_NR)
    position_NR = wanted_NR.cumsum(0) - 1
    fits_NR = wanted_NR & (position_NR < rooms_R)
    place_NR = torch.where(fits_NR, starts_R + position_NR, places)  # one place beyond them takes all the rest
    row_NR = torch.arange(rows, device=wanted_NR.device)[:, None].expand_as(place_NR)
    source = torch.full((places + 1,), rows, dtype=torch.int64, device=wanted_NR.device)
    source.scatter_(0, place_NR.reshape(-1), row_NR.reshape(-1))
    return Packed(source[:places], (wanted_NR & ~fits_NR).any())


class Seated(NamedTuple):
    """Some rows, moved together."""

    row: torch.Tensor  # (room,) rows that are wanted, in their order, then others
    exceeded: torch.Tensor  # () bool: more are wanted than there is room for


def seat_rows(wanted_N: torch.Tensor, room: int) -> Seated:
    """The rows that are wanted, in their order, in front of others; at most `room`."""
    order_N = (~wanted_N).to(torch.uint8).argsort(stable=True)
    return Seated(order_N[:room], wanted_N.sum() > room)
