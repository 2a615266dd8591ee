"""FixedSlots: the serving slots of tokens, and rooms of messages, without a copy between host and device in a step."""

from functools import lru_cache

import torch

from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime
from moeplace.runtime.exchange.fixed.rows import NOBODY, Rooms
from moeplace.runtime.exchange.fixed.step import StepNotes
from moeplace.runtime.exchange.replica_choice import choose_slots

_KNOWN_ROOMS = 4096


class FixedSlots:
    """What dispatchers in fixed shapes share."""

    def __init__(self, runtime: MoeRuntime) -> None:
        self._runtime = runtime
        self._near = torch.full((1,), runtime.tables.rank, dtype=torch.int64, device=runtime.tables.rank_of_slot.device)
        self._known = lru_cache(_KNOWN_ROOMS)(_make_rooms)

    def choose(
        self, layer: int, block: MoeBlock, hidden: torch.Tensor, token: torch.Tensor, notes: StepNotes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serving slots (N, K), -1 = none, of tokens (N,), -1 = nobody, and gate weights (N, K)."""
        ids, weights = block.route(hidden, token)
        ids = torch.where(token[:, None] == NOBODY, -1, ids)
        if self._runtime.window is not None:
            notes.routed.append((layer, ids, token))
        near = self._near.expand(len(token))
        tables, running = self._runtime.tables, self._runtime.running
        return choose_slots(tables, layer, ids, near=near, rotation=token, running=running), weights

    def rooms(self, capacity: Capacity, rank: int, device: torch.device) -> Rooms:
        """Of messages to and from `rank`; tensors of rooms that are known already are on the device."""
        return self._known(tuple(capacity.to_peer), tuple(capacity.from_peer), rank, device)


def _make_rooms(to_peer: tuple[int, ...], from_peer: tuple[int, ...], rank: int, device: torch.device) -> Rooms:
    return Rooms.of(Capacity(to_peer, from_peer), rank=rank, device=device)
