"""Who asks a service for tokens."""

import threading
from collections.abc import Callable, Collection

from moeplace.runtime.service.api import TokenEvent


class Client:
    """Hears of requests.

    Attributes:
        tokens: per request.
        reasons: why requests have ended, of those that have.
        first: whether anything was heard.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.first = threading.Event()
        self._changed = threading.Condition()

    def __call__(self, event: TokenEvent) -> None:
        with self._changed:
            assert event.request_id not in self.reasons
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            self.first.set()
            if event.finish_reason is not None:
                self.reasons[event.request_id] = event.finish_reason
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Until it holds of what was heard; whether it does after so many seconds."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def await_ends(self, names: Collection[str], timeout: float) -> None:
        """Until these requests have ended."""
        assert self.wait_for(lambda: set(names) <= set(self.reasons), timeout), (names, self.reasons)
