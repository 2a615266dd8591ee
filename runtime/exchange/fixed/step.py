"""FixedShapes: steps in fixed shapes, and the one place where it shows whether there was room for everything.

    dispatchers in fixed shapes: every layer of the step
      -> one flag of all ranks, read once per step
      -> 0: what the step noted (routing, counts) is kept
         1: it is dropped, and the exact dispatcher runs the step again from its beginning

A step that is run again writes the same K/V to the same places, so nothing has to be taken back. The exact dispatcher
tells the rules of capacity what there was, and the next step has room for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import MoeRuntime, TokenDispatcher, TokenRows
from moeplace.runtime.exchange.fixed.rows import NOBODY


@dataclass(eq=False)
class StepNotes:
    """What a step in fixed shapes leaves for the host, gathered on the device.

    Attributes:
        exceeded: flags of exchanges without room.
        routed: (layer, ids (N, K), token (N,)) of every layer.
    """

    exceeded: list[torch.Tensor] = field(default_factory=list)
    routed: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def flag(self, device: torch.device) -> torch.Tensor:
        """(1,) int64: 1 = there was no room somewhere."""
        if not self.exceeded:
            return torch.zeros(1, dtype=torch.int64, device=device)
        return torch.stack(self.exceeded).any().to(torch.int64).unsqueeze(0)

    def keep(self, runtime: MoeRuntime) -> None:
        """Tell the window where tokens were routed: one copy to the host for all layers."""
        runtime.computation.keep_counts()
        if runtime.window is None or not self.routed:
            return
        joined = [torch.cat([ids, token[:, None]], dim=1) for _, ids, token in self.routed]
        host = torch.cat(joined).cpu().numpy()
        start = 0
        for layer, ids, _ in self.routed:
            rows = host[start : start + len(ids)]
            start += len(ids)
            rows = rows[rows[:, -1] != NOBODY]
            runtime.window.record(layer, rows[:, :-1], rows[:, -1])


class FixedDispatcher(TokenDispatcher, Protocol):
    """A dispatcher that reads nothing on the host.

    Attributes:
        runtime: as of other dispatchers.
        group: the ranks.
        notes: of the step under way.
    """

    runtime: MoeRuntime
    group: RankGroup
    notes: StepNotes


class FixedShapes:
    """See the module."""

    def __init__(self, fixed: FixedDispatcher, exact: TokenDispatcher) -> None:
        """`fixed` and `exact` of the same mode; they share the rules of capacity."""
        self.fixed, self.exact = fixed, exact

    def run(self, run_layers: Callable[[TokenDispatcher], TokenRows]) -> TokenRows:
        """A step: `run_layers` with a dispatcher runs all its layers, from the tokens' homes on.

        Returns:
            Tokens that are on this rank at the end, none of them nobody.
        """
        fixed, running = self.fixed, self.fixed.runtime.running
        fixed.notes = StepNotes()
        before = None if running is None else running.carried_LR.clone()
        rows = run_layers(fixed)
        if self._is_exceeded(rows.x.device):
            fixed.group.counters.overflows += 1
            fixed.runtime.computation.drop_counts()
            if running is not None:
                running.carried_LR.copy_(before)
            return run_layers(self.exact)
        fixed.notes.keep(fixed.runtime)
        return without_nobody(rows)

    def _is_exceeded(self, device: torch.device) -> bool:
        """Whether some rank had no room: a small collective, and the one number that a step is asked for."""
        if self.fixed.group.size == 1:
            return False
        flag = self.fixed.notes.flag(device)
        self.fixed.group.all_reduce(flag, kind="exceeded")
        is_exceeded = bool(flag.item())
        self.fixed.group.raise_if_lost()
        return is_exceeded


def without_nobody(rows: TokenRows) -> TokenRows:
    """The tokens alone; after a step, when their number may be known."""
    held = (rows.token != NOBODY).nonzero().squeeze(1)
    if len(held) == len(rows):
        return rows
    return TokenRows(rows.x.index_select(0, held), rows.token.index_select(0, held))
