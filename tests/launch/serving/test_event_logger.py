"""What happens to members is in the log: every event once, trouble as a warning."""

import logging

import pytest

from moeplace.launch.serving.event_logger import EventLogger
from moeplace.runtime.event import Event
from tests.launch.http_front.http_services import ManualService


class Eventful(ManualService):
    """Forgets all but its last three events."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Event] = []

    def events(self) -> list[Event]:
        return self.log[-3:]


def test_every_event_once(caplog: pytest.LogCaptureFixture) -> None:
    """Also when old events go, and those that come just before the end."""
    service = Eventful()
    logger = EventLogger(service)
    with caplog.at_level(logging.INFO, "moeplace.service"):
        for number, kind in enumerate(("joined", "loss", "replace-failed", "loss", "failed", "left")):
            service.log.append(Event(0.0, kind, f"event {number}"))
            if number % 2:
                logger.log_new()
        logger.log_new()
        with EventLogger(service):
            service.log = [Event(0.0, "loss", "the last")]
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines[:-1] == [
        *(("INFO", "joined: event 0"), ("WARNING", "loss: event 1"), ("WARNING", "replace-failed: event 2")),
        *(("WARNING", "loss: event 3"), ("WARNING", "failed: event 4"), ("INFO", "left: event 5")),
    ]
    assert lines[-1] == ("WARNING", "loss: the last")
