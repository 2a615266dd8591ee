"""A service under faults: ranks die or hang at chosen moments, and every request gets the tokens of the oracle."""

import threading
from pathlib import Path

import numpy as np
import pytest

from moeplace.placement.placement import index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from tests.runtime.injector import EventInjector
from tests.runtime.placements import turned
from tests.runtime.service.loaded_service import CHANGE, START, request, serve

pytestmark = pytest.mark.timeout(600)


def test_two_losses_in_a_row_and_a_join_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0 dies within a step, another one while the next generation forms, a newcomer before it is a rank."""
    injector = EventInjector().fail_at(0, "tokens", 15).fail_at(1, "snapshots", 3).fail_at(3, "forming", 1)
    with serve(checkpoint, 3, injector, tmp_path, mode="coherent") as load:
        service = load.service
        assert service.wait_for(lambda status: status.active == (2,), timeout=CHANGE)
        assert service.status().desired == 1
        service.scale(2)
        assert service.wait_for(lambda status: "member 3 could not join" in status.reason, timeout=START)
        status = service.status()
        assert (status.serving, status.desired, status.active, status.routable) == (True, 1, (2,), (2,))


def test_a_hung_rank_and_a_loss_during_a_migration(checkpoint: Path, tmp_path: Path) -> None:
    """A rank stops without dying; later one of the two that are left dies while experts are on their way."""
    injector = EventInjector().fail_at(1, "step", 12, action="stop").fail_at(0, "migration", 2, after=True)
    options = {"mode": "dispatch-combine", "timeout": 3.0, "bytes_per_step": 500, "probe_tokens": 3}
    with serve(checkpoint, 3, injector, tmp_path, **options) as load:
        service = load.service
        check_refusals(service)
        assert service.wait_for(lambda status: status.active == (0, 2), timeout=CHANGE)
        service.replace(turned(service.placement))
        assert service.wait_for(lambda status: status.active == (2,), timeout=CHANGE)
        assert service.placement.num_ranks == 1
    with pytest.raises(MoeplaceError, match="the service was closed"):
        load.service.submit(request(0), print)


def check_refusals(service: Coordinator) -> None:
    """One sentence for each; what is cancelled ends so, and what is not known is ignored."""
    events: list[TokenEvent] = []
    ended = threading.Event()

    def hear(event: TokenEvent) -> None:
        events.append(event)
        if event.finish_reason is not None:
            ended.set()

    with pytest.raises(InputError, match="needs 65 positions"):
        service.submit(Request("long", (1,) * 60, max_new_tokens=5), hear)
    with pytest.raises(InputError, match=r"token id 60, which must lie in 0\.\.59"):
        service.submit(Request("odd", (60,), max_new_tokens=5), hear)
    with pytest.raises(InputError, match="member 7 cannot leave"):
        service.scale(1, leaving=[7])
    with pytest.raises(InputError, match=r"ranks \(0\) must be at least 1"):
        service.scale(0)
    with pytest.raises(InputError, match="the placement is for 2 ranks, but 3 are active"):
        service.replace(index_order(np.full(3, 6), np.array([3, 3]), np.zeros(2, np.int64)))
    with pytest.raises(InputError, match=r"ranks \(1000000\) must be at most 6"):
        service.scale(1_000_000)
    service.submit(Request("endless", (1, 2), max_new_tokens=60, stop_ids=()), hear)
    service.cancel("endless")
    service.cancel("unknown")
    assert ended.wait(CHANGE)
    assert events[-1] == TokenEvent("endless", (), "cancelled")
