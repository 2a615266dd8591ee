"""A service whose members choose modes by recorded routing: tokens are those of one process, whoever comes and goes."""

from pathlib import Path

import numpy as np
import pytest

from moeplace.placement.placement import index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.service.api import ServiceStatus
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.coordinator.first import member_options
from moeplace.runtime.service.options import ServiceOptions
from tests.runtime.forked_members import ForkingSpawner
from tests.runtime.injector import EventInjector
from tests.runtime.placements import turned
from tests.runtime.service.loaded_service import CHANGE, LIMITS, START, serve

pytestmark = pytest.mark.timeout(600)


def write_trace(folder: Path, experts: int = 6) -> str:
    """Routing of a model with so many experts."""
    ids = np.random.default_rng(0).integers(0, experts, (200, 3, 1))
    save_trace(folder / "t.npz", RoutingTrace(ids, np.full(3, experts)))
    return str(folder / "t.npz")


def uses_another_mode(status: ServiceStatus) -> bool:
    """Than `dispatch-combine`, for which placements are made where nobody says otherwise."""
    return bool(set(status.counters.get("layer_passes", ())) - {"dispatch-combine"})


def test_members_choose_by_prediction(checkpoint: Path, tmp_path: Path) -> None:
    """Through a join, a re-placement and a loss; some passes run in a mode that the placement was not made for."""
    injector = EventInjector().fail_at(1, "migration", 2, after=True)
    options = {"mode": "auto", "trace": write_trace(tmp_path), "bytes_per_step": 500}
    with serve(checkpoint, 2, injector, tmp_path, **options) as load:
        service = load.service
        assert service.placement.mode == "dispatch-combine"
        service.scale(3)
        assert service.wait_for(lambda status: len(status.active) == 3, timeout=START)
        service.replace(turned(service.placement))
        assert service.wait_for(lambda status: 1 not in status.active, timeout=CHANGE)
        assert service.wait_for(uses_another_mode, timeout=CHANGE)


def test_rows_are_on_every_rank_where_a_pass_may_be_coherent() -> None:
    """Predictions may say so; a mode that is fixed says it by itself."""
    placement = index_order(np.full(3, 6), np.array([3, 3]), np.zeros(2, np.int64))
    for mode, trace, shared in (("auto", None, 6), ("auto", "t.npz", None), ("allgather", "t.npz", 6)):
        options = member_options(ServiceOptions(mode=mode, limits=LIMITS, trace=trace), placement, 2)
        assert options.limits.rank_sequences == shared


def test_what_members_could_not_read_is_refused_first(checkpoint: Path, tmp_path: Path) -> None:
    """A file that is missing, or of another model: one sentence, and nobody is started."""
    spawner = ForkingSpawner(tmp_path)
    for trace, error, words in (
        (str(tmp_path / "none.npz"), MoeplaceError, "none.npz"),
        (write_trace(tmp_path, experts=5), InputError, "the placement is for another model"),
    ):
        with pytest.raises(error, match=words):
            Coordinator(checkpoint, ranks=2, spawner=spawner, options=ServiceOptions(limits=LIMITS, trace=trace))
    assert not list(tmp_path.glob("member-*"))
