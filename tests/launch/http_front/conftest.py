"""What the tests of the front share: a service that a test plays by hand, and threads for clients that wait."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launch.http_front.http_services import ManualService


@pytest.fixture
def service() -> ManualService:
    return ManualService()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor
