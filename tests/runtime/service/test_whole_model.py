"""A service of a model that runs whole: sequences have states of the family's own, made again where they are lost."""

from pathlib import Path

from tests.model_families import save_family
from tests.runtime.injector import EventInjector
from tests.runtime.placements import turned
from tests.runtime.service.loaded_service import CHANGE, serve


def test_a_loss_within_a_step_and_a_replacement(tmp_path: Path) -> None:
    """Recurrent states beside K/V: a rank dies in the middle of a pass, experts move, and no token changes."""
    save_family("minimax", tmp_path / "minimax")
    injector = EventInjector().fail_at(1, "tokens", 15)
    logs = tmp_path / "logs"
    logs.mkdir()
    with serve(tmp_path / "minimax", 3, injector, logs, mode="dispatch-combine") as load:
        load.logprob_error = 1e-5  # the family keeps its decay in float32, and a lost state is made again in one pass
        service = load.service
        assert service.wait_for(lambda status: status.active == (0, 2), timeout=CHANGE)
        placement = service.placement
        service.replace(turned(placement))
        assert service.wait_for(lambda status: service.placement.digest != placement.digest, timeout=CHANGE)
