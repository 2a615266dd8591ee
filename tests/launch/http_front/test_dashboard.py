"""The live page: its data behind the token, the placement once, nothing from elsewhere."""

import re
from typing import Any

import httpx
import numpy as np
import pytest

from moeplace.launch.http_front.dashboard import PAGE, STATE
from tests.launch.http_front.http_services import WAIT, ManualService, served


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=WAIT, **options)


def test_the_state_is_that_of_the_service() -> None:
    """Status, counters by tier, events, and the placement until the page has it."""
    service = ManualService()
    with served(service, dashboard=True) as front:
        document = get(front.url + STATE).json()
        again = get(front.url + STATE, params={"digest": document["placement"]["digest"]}).json()
    status = service.status()
    for name in ("serving", "generation", "placement_version", "desired", "waiting", "running", "steps", "tokens"):
        assert document[name] == getattr(status, name)
    assert document["bytes_sent"] == {"local": 0, "intra_node": 0, "inter_node": 8}
    assert document["migration"] == {"bytes_moved": 5, "bytes_planned": 9, "commits": 1}
    assert document["imbalance"] == pytest.approx(list(status.imbalance_per_layer))
    assert document["layer_ids"] == list(range(3, 103))
    np.testing.assert_array_equal(document["placement"]["slot_to_expert"], service.placement.slot_to_expert)
    assert document["placement"]["slots_of_rank"] == [2, 2]
    assert again["placement"] is None
    assert again["time"] >= document["time"]


def test_data_needs_the_token_and_the_page_has_none() -> None:
    """The page is open because it says nothing; what it shows is behind the same token as all routes."""
    with served(ManualService(), dashboard=True, api_key="secret") as front:
        page = get(front.url + PAGE)
        assert page.status_code == 200
        assert get(front.url + STATE).status_code == 401
        assert get(front.url + STATE, headers={"Host": "x/dashboard?"}).status_code == 401
        assert get(front.url + STATE, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert "secret" not in page.text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_it_is_there_on_request_only() -> None:
    """Without the flag neither route exists."""
    with served(ManualService()) as front:
        assert [get(front.url + path).status_code for path in (PAGE, STATE)] == [404, 404]
