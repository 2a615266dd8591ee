"""What a member does by itself: experts that it takes, and generations that never came about."""

import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.replacement.width import Adoption, adopt
from moeplace.runtime.counters import Counters
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.loading import load_experts
from moeplace.runtime.errors import MigrationError, PeerLostError
from moeplace.runtime.experts.row_contents import NOTHING
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.generation import Forming, Generation
from moeplace.runtime.service.member.entry import Entrance
from moeplace.runtime.service.store import ServiceEndedError
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.placements import placement_for

RANKS = 4
WAIT = 30.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("olmoe")
    save_checkpoint("olmoe", folder)
    return Checkpoint(folder)


def store_of(checkpoint: Checkpoint, placement: Placement, rank: int) -> ExpertStore:
    return load_experts(checkpoint, placement, rank, EngineLimits(staging_rows=1), torch.float64, torch.device("cpu"))


def read(checkpoint: Checkpoint, store: ExpertStore, adoption: Adoption, rank: int) -> None:
    """As a member does that goes on after a loss."""
    entrance = Entrance.__new__(Entrance)
    entrance._checkpoint = checkpoint
    executor = SimpleNamespace(runtime=SimpleNamespace(experts=store))
    entrance._read_experts(SimpleNamespace(engine=SimpleNamespace(executor=executor)), adoption, rank)  # type: ignore[arg-type]


def survive(checkpoint: Checkpoint, placement: Placement, left: list[int]) -> Adoption:
    """The placement of those that are left, by what each of them held when the last generation was in force."""
    held = [placement.slot_to_expert[:, placement.slots_on(rank)] for rank in left]
    fields = {"layer_ids": checkpoint.layer_ids, "num_hidden_layers": checkpoint.num_hidden_layers}
    return adopt(held, checkpoint.experts_per_layer, np.zeros(len(left), np.int64), **fields)


def misnamed(store: ExpertStore, placement: Placement, rank: int) -> list[tuple[int, int]]:
    """(layer, row) of rows that hold something else than what a slot of the placement names, or that no slot has."""
    wanted = placement.slot_to_expert[:, placement.slots_on(rank)]
    wrong = []
    for layer, experts in enumerate(store.contents.expert_of_row):
        slot_of_row = {row: slot for slot, row in enumerate(store.row_of_slot[layer].tolist())}
        for row, expert in enumerate(experts):
            slot = slot_of_row.get(row)
            named = NOTHING if slot is None or wanted[layer, slot] == EMPTY_SLOT else int(wanted[layer, slot])
            wrong += [(layer, row)] if expert != named else []
    return wrong


@pytest.mark.parametrize("fixed", [0, 1, 2, None])
def test_a_generation_that_did_not_come_about_leaves_no_experts(
    checkpoint: Checkpoint, fixed: int | None, dated_seed: int
) -> None:
    """Ranks are lost while others read what the lost ones before had: what was read for nothing is forgotten, else its
    rows would be missing where a re-placement counts on empty slots."""
    seed = dated_seed % 1000 if fixed is None else fixed
    rng, forgotten = np.random.default_rng(seed), 0
    for attempt in range(8):
        placement = placement_for(checkpoint, RANKS, seed=100 * seed + attempt, extra_slots=2)
        stores = {rank: store_of(checkpoint, placement, rank) for rank in range(RANKS)}
        left = list(range(RANKS))
        for _ in range(RANKS - 1):
            left.remove(int(rng.choice(left)))
            adoption = survive(checkpoint, placement, left)
            for place, rank in enumerate(left):
                before = sum(row != NOTHING for layer in stores[rank].contents.expert_of_row for row in layer)
                read(checkpoint, stores[rank], adoption, place)
                assert misnamed(stores[rank], adoption.placement, place) == []
                after = sum(row != NOTHING for layer in stores[rank].contents.expert_of_row for row in layer)
                taken = sum(taker == place for *_, taker in adoption.adopted)
                forgotten += before + taken - after
    assert forgotten > 0


def test_who_does_not_know_checksums_yet_reads_all_the_same(checkpoint: Checkpoint) -> None:
    """A rank is lost as all were about to learn them. Who knows them reads nothing else than what was there before."""
    placement = placement_for(checkpoint, 2, seed=1)
    adoption = survive(checkpoint, placement, [0])
    assert adoption.adopted
    store = store_of(checkpoint, placement, 0)
    assert store.contents.reference is None
    read(checkpoint, store, adoption, 0)
    assert misnamed(store, adoption.placement, 0) == []
    store.contents.reference = np.zeros((3, 6, len(store.contents.parts)), np.int64)
    with pytest.raises(MigrationError, match=r"expert \d of MoE layer \d reads from the checkpoint with other bytes"):
        read(checkpoint, store, adoption, 0)


class Reports:
    """A store that takes reports; `ends` when the coordinator is gone."""

    def __init__(self, *, ends: bool = False) -> None:
        self.documents: list[dict[str, Any]] = []
        self._ends = ends

    def report(self, document: dict[str, Any]) -> None:
        if self._ends:
            raise ServiceEndedError("the coordinator is gone")
        self.documents.append(document)


class BrokenGroup:
    """Connected, but what is made from it is not."""

    def __init__(self, error: Exception) -> None:
        self.error, self.is_closed = error, False

    def open_all(self) -> None:
        raise self.error

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("at", ["connect", "open"])
@pytest.mark.parametrize("error", [PeerLostError("rank 1 went"), RuntimeError("[enforce fail] no memory"), OSError(24)])
def test_whatever_keeps_a_group_from_forming_is_reported(
    at: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would ever give the generation up: it was proposed, and its members were waited for."""
    group = BrokenGroup(error)

    def connect(self: Generation, store: Any, member: int, **_: Any) -> Any:
        if at == "connect":
            raise error
        return group

    monkeypatch.setattr(Generation, "connect", connect)
    store, forming = Reports(), Forming(Generation.of(7, {0: 0, 1: 0}))
    options = {"timeout": 1.0, "counters": Counters(), "device": torch.device("cpu")}
    forming.start(store, 1, **options)  # type: ignore[arg-type]
    assert forming.wait(WAIT)
    assert forming.group is None
    assert forming.error
    assert store.documents == [{"kind": "prepared", "member": 1, "generation": 7, "error": forming.error}]
    assert str(error) in forming.error
    assert group.is_closed == (at == "open")


def test_a_group_that_forms_when_nobody_is_there_any_more_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator is gone: the thread ends without a traceback, and the member notices by itself."""
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(Generation, "connect", lambda *_, **__: SimpleNamespace(open_all=lambda: None))
    forming = Forming(Generation.of(7, {0: 0}))
    options = {"timeout": 1.0, "counters": Counters(), "device": torch.device("cpu")}
    forming.start(Reports(ends=True), 0, **options)  # type: ignore[arg-type]
    assert forming.wait(WAIT)
    assert forming.group is not None
    assert not failed


def test_nothing_of_a_group_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a back end reads of its store comes within the time of a collective, or is given up: a connection of a
    member waits for a year, as long as there is a coordinator."""
    made: list[Any] = []
    monkeypatch.setattr("moeplace.runtime.service.generation.RankGroup", lambda place, **options: made.append(place))
    root = dist.HashStore()
    root.set_timeout(timedelta(days=365))
    store: Any = SimpleNamespace(for_group=lambda number: dist.PrefixStore(f"group/{number}", root))
    options = {"timeout": 7.0, "counters": Counters(), "device": torch.device("cpu")}
    Generation.of(1, {4: 0, 5: 0}).connect(store, 5, **options)  # type: ignore[arg-type]
    assert made[0].timeout == timedelta(seconds=7)
    assert root.timeout == timedelta(seconds=7)


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("adopted", [(), ((0, 1, 0),)])
def test_who_reads_experts_says_so(adopted: tuple[Any, ...], is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk may take is another matter than what a step may; where nothing is to be read nobody waits. Ranks
    that are new agree as they start, the others before they read, so that nobody waits for who reads in a group."""
    done: list[str] = []
    executor = SimpleNamespace(install=lambda *_, version: done.append(f"install {version}"))
    engine = SimpleNamespace(
        agree=lambda *_: done.append("agree"),
        regroup=lambda *_, version: done.append(f"regroup {version}"),
        executor=executor,
    )
    serving: Any = SimpleNamespace(engine=engine)

    def start(*_: Any) -> Any:
        done.extend(["agree", "read"])  # as an engine does
        return serving

    entrance = Entrance.__new__(Entrance)
    entrance._faults = SimpleNamespace(reach=done.append)  # type: ignore[assignment]
    entrance._heartbeat = SimpleNamespace(load=lambda: done.append("load"))  # type: ignore[assignment]
    monkeypatch.setattr(Entrance, "_start_serving", start)
    monkeypatch.setattr(Entrance, "_read_experts", lambda *_: done.append("read"))
    monkeypatch.setattr(Entrance, "_await_others", lambda *_: done.append("await"))
    entrance._serving = None if is_new else serving
    adoption: Any = SimpleNamespace(adopted=adopted, placement=None)
    group: Any = SimpleNamespace(rank=0)
    assert entrance._take_experts(Generation.of(4, {0: 0}), adoption, group, 9) is serving
    before, after = (["loading", "load"], ["await"]) if adopted else ([], [])
    assert done == [*before, "agree", "read", *after, "install 9" if is_new else "regroup 9"]
