"""A collective that was given up brings whatever was in memory: whoever reads a number of it asks first whether it has
ended, and keeps nothing of it. Each reader is tried with a group whose collectives are all given up."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.modes import FixedMode, ModeChooser, PredictedMode
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.exchange.fixed.step import FixedShapes, StepNotes
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.experts.row_contents import RowContents
from moeplace.runtime.kv.exchange import share_kv
from moeplace.runtime.migration.live import LiveMigration
from tests.runtime.placements import random_placement

GARBAGE = 1 << 40


class GivenUpGroup:
    """Rank 0 or 1 of two; what is read after a collective is garbage, and that it was given up shows afterwards."""

    size, num_nodes, device = 2, 1, torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.rank, self.node_of_rank = rank, np.zeros(2, np.int64)
        self.counters = SimpleNamespace(overflows=0)
        self.issued = 0

    def _give_up(self, output: torch.Tensor) -> None:
        self.issued += 1
        output.fill_(GARBAGE if output.dtype == torch.int64 else torch.nan)

    def all_reduce(self, tensor: torch.Tensor, *, kind: str) -> None:
        self._give_up(tensor)

    def broadcast(self, tensor: torch.Tensor, *, root: int, kind: str) -> None:
        self._give_up(tensor)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, kind: str) -> None:
        self._give_up(output)

    def raise_if_lost(self) -> None:
        raise PeerLostError("it was given up")


Case = tuple[Callable[[], Any], Callable[[], bool]]
"""What reads, and whether it has kept nothing."""


def knowing() -> RowContents:
    contents = RowContents([2, 2], ("down",))
    contents.fill(0, 0, 1, (5,))
    return contents


def learn_checksums(group: Any) -> Case:
    contents = knowing()
    placement = random_placement(2, 4, 2, seed=1)
    return lambda: contents.share_reference(group, placement), lambda: contents.reference is None


def hear_checksums(group: Any) -> Case:
    """Of one who knows them already, and would not be told again."""
    contents, known = knowing(), np.ones((2, 4, 1), np.int64)
    contents.reference = known
    placement = random_placement(2, 4, 2, seed=1)
    return (
        lambda: contents.receive_reference(group, placement, root=1 - group.rank),
        lambda: contents.reference is known and bool((known == 1).all()),
    )


def ask_for_a_mode(group: Any) -> Case:
    chooser = ModeChooser(PredictedMode(lambda *_: 1.0), random_placement(2, 4, 2, seed=1), group)
    return lambda: chooser.choose("decode", 3), lambda: not chooser._decided


def run_in_fixed_shapes(group: Any) -> Case:
    kept: list[str] = []
    computation = SimpleNamespace(keep_counts=lambda: kept.append("kept"), drop_counts=lambda: kept.append("dropped"))
    runtime = SimpleNamespace(running=None, computation=computation, window=None)
    shapes = FixedShapes(SimpleNamespace(runtime=runtime, group=group, notes=StepNotes()), None)  # type: ignore[arg-type]
    rows = SimpleNamespace(x=torch.zeros(1, 2))
    return lambda: shapes.run(lambda _: rows), lambda: not kept  # type: ignore[arg-type, return-value]


def tell_a_note(group: Any) -> Case:
    engine = Engine.__new__(Engine)
    engine.group = group
    return lambda: engine.tell(3), lambda: True


def count_rows(group: Any) -> Case:
    ledger = KvLedger()
    ledger.add(0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2))
    return lambda: share_kv(group, ledger), lambda: ledger.announced is None


def compare_digests(group: Any) -> Case:
    placement = random_placement(2, 4, 2, seed=1)
    migration = LiveMigration.__new__(LiveMigration)
    migration._engine = SimpleNamespace(group=group)  # type: ignore[assignment]
    migration._staging = SimpleNamespace(first_damaged=lambda *_: None)  # type: ignore[assignment]
    return lambda: migration._check_ranks(placement, placement), lambda: True


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "make",
    [learn_checksums, hear_checksums, ask_for_a_mode, run_in_fixed_shapes, tell_a_note, count_rows, compare_digests],
)
def test_nothing_is_used_of_what_was_given_up(make: Callable[[Any], Case], rank: int) -> None:
    """A lost peer is what it is called, and not by the garbage that was read; nothing of that outlives it."""
    group = GivenUpGroup(rank)
    read, is_clean = make(group)
    with pytest.raises(PeerLostError):
        read()
    assert group.issued == 1
    assert is_clean()


def test_who_asks_nobody_is_not_disturbed() -> None:
    """A rule that is the same on all ranks needs no collective."""
    chooser = ModeChooser(FixedMode("allgather", "asked for"), random_placement(2, 4, 2, seed=1), GivenUpGroup(1))  # type: ignore[arg-type]
    assert chooser.choose("decode", 3) == "allgather"
