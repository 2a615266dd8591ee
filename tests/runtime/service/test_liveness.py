"""Liveness: hung is told from busy, by signs alone."""

import pytest

from moeplace.runtime.service.coordinator.liveness import Liveness
from moeplace.runtime.service.options import ServiceOptions

STATES = {"a": "busy", "i": "idle", "l": "loading"}


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(ServiceOptions(timeout=4.0, step_timeout=30.0, start_timeout=60.0))


def beat(liveness: Liveness, until: int, **turns: int) -> dict[int, str]:
    """Members give signs once a second: a1=5 is busy at turn 5, a1=-1 goes on, i idles, l loads. Who is given up at any
    of the looks, and why."""
    found: dict[int, str] = {}
    for now in range(until):
        for name, turn in turns.items():
            liveness.hear(int(name[1:]), now if turn < 0 else turn, state=STATES[name[0]], now=float(now))
        found |= liveness.look(float(now))
    return found


def test_busy_is_not_hung(liveness: Liveness) -> None:
    """A step may take longer than a sign of life may be missing; idle members may wait for ever."""
    assert beat(liveness, 29, a1=5, i2=3, a3=-1) == {}
    assert beat(liveness, 100, i2=3, a3=-1) == {1: "it hung: no sign of life for 4 s"}


def test_a_step_that_never_ends(liveness: Liveness) -> None:
    """Is noticed although the member lives."""
    assert beat(liveness, 32, a1=5, i2=3, a3=-1) == {1: "its step did not end within 30 s"}


def test_experts_that_are_never_read(liveness: Liveness) -> None:
    """A disk has another time than a step; who waits for those who read has all of it."""
    assert beat(liveness, 61, l1=5, i2=5) == {}
    assert beat(liveness, 63, l1=5, i2=5) == {1: "it had not read its experts within 60 s"}


def test_each_turn_has_its_time(liveness: Liveness) -> None:
    """From when it began: reading, then a step, then waiting, all at one turn or each at its own."""
    for now in range(150):
        state = "loading" if now < 55 else "busy" if now < 80 else "idle"
        liveness.hear(1, 7, state=state, now=float(now))
        assert liveness.look(float(now)) == {}


@pytest.mark.parametrize(("timeout", "interval"), [(4.0, 1.0), (0.2, 0.1), (0.4, 0.1), (20.0, 5.0), (60.0, 5.0)])
def test_how_often_is_looked(timeout: float, interval: float) -> None:
    """Four times in the time that silence may last, within bounds."""
    assert Liveness(ServiceOptions(timeout=timeout)).interval == interval


def test_a_look_may_be_as_late_as_it_is_long(liveness: Liveness) -> None:
    """Twice the interval is no sleep; a moment more is."""
    for moment, found in ((5.0, {1: "it hung: no sign of life for 4 s"}), (5.01, {})):
        liveness.hear(1, 0, state="idle", now=0.0)
        assert [liveness.look(float(now)) for now in (0, 1, 2, 3)] == [{}] * 4
        assert liveness.look(moment) == found
        assert liveness.look(-100.0) == {}  # the clock is set: a new beginning


def test_silence(liveness: Liveness) -> None:
    """For as long as was said, no less; who is gone is not looked for, who never said anything is not known."""
    liveness.hear(1, 0, state="idle", now=0.0)
    assert [liveness.look(float(now)) for now in range(5)] == [{}] * 5
    assert liveness.look(4.5) == {1: "it hung: no sign of life for 4 s"}
    liveness.forget(1)
    assert liveness.look(5.5) == {}


@pytest.mark.parametrize("moment", [100.0, -50.0])
def test_whoever_looks_may_sleep(liveness: Liveness, moment: float) -> None:
    """When it was the watcher that did not run, or the clock that was set, nobody else is to blame."""
    liveness.hear(1, 0, state="busy", now=1.0)
    assert liveness.look(1.5) == {}
    assert liveness.look(moment) == {}
    assert liveness.look(moment + 1) == {}
    liveness.hear(1, 1, state="busy", now=moment + 1.5)
    assert liveness.look(moment + 2) == {}
