"""The administration: place, drain a member, forbid re-placement; and what is shown of it all."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeplace.launch.http_front.fair_queue import FairQueue
from moeplace.launch.http_front.wire.metrics import FrontMetrics
from moeplace.placement.placement import index_order
from moeplace.placement.placement_file import save_placement
from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, served

GRAFANA = Path(__file__).resolve().parents[3] / "docs" / "grafana.json"


PLAN = {"experts": {"exact": 3, "int8": 5, "int4": 0}, "predicted_error": 0.25}


def post(front: ThreadedFront, name: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": "Bearer root", "Content-Type": "application/json"}
    return httpx.post(f"{front.url}/admin/{name}", content=content, headers=headers, timeout=WAIT)


def test_a_placement_is_handed_to_the_service(tmp_path: Path) -> None:
    """As its file has it; one for other ranks, a damaged one and something else are refused in one sentence."""
    service = ManualService()
    path = tmp_path / "placement.json"
    with served(service, admin_key="root", admin=True) as front:
        wanted = index_order(np.full(100, 4), np.full(2, 2), np.zeros(2, int), layer_ids=np.arange(3, 103))
        save_placement(path, wanted)
        assert post(front, "place", path.read_bytes()).status_code == 202
        assert service.placed is not None
        assert service.placed.digest == wanted.digest
        content = path.read_text()
        save_placement(path, index_order(np.full(100, 4), np.full(4, 1), np.zeros(4, int), layer_ids=np.arange(100)))
        for damaged, sentence in (
            (path.read_bytes(), "is for 4 ranks, but 2 are active"),
            (content.replace("[0, 1, 2, 3]", "[1, 0, 2, 3]", 1).encode(), "the body was changed after it was written"),
            (b"{}", "the body is not a placement file"),
            (b"[", "the body"),
        ):
            answer = post(front, "place", damaged)
            assert answer.status_code == 400, damaged[:80]
            assert sentence in answer.json()["error"]["message"]
            assert "/tmp" not in answer.json()["error"]["message"]


def test_a_member_is_drained() -> None:
    """One rank fewer, that one."""
    service = ManualService()
    with served(service, admin_key="root", admin=True) as front:
        assert post(front, "drain", {"member": 1}).status_code == 202
        assert service.scaled == (3, [1])
        for body in ({}, {"member": "1"}, {"member": True}, {"member": -1}, {"member": 1, "now": True}):
            assert post(front, "drain", body).status_code == 400


def test_re_placement_is_forbidden_and_allowed_again() -> None:
    """What the front's permit says."""
    with served(ManualService(), admin_key="root", admin=True) as front:
        assert post(front, "replanning", {"allowed": False}).json()["replanning_allowed"] is False
        headers = {"Authorization": "Bearer root"}
        status = httpx.get(f"{front.url}/admin/status", headers=headers, timeout=WAIT).json()
        assert status["replanning_allowed"] is False
        assert post(front, "replanning", {"allowed": True}).json()["replanning_allowed"] is True
        assert post(front, "replanning", {"allowed": "no"}).status_code == 400


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, str], float]:
    """(name, first label) -> value; of a service that keeps some experts in fewer bits."""
    with served(ManualService(), precision=PLAN) as front:
        httpx.get(f"{front.url}/healthz", timeout=WAIT)  # an answer that can be counted
        families = text_string_to_metric_families(httpx.get(f"{front.url}/metrics", timeout=WAIT).text)
        return {(s.name, next(iter(s.labels.values()), "")): s.value for family in families for s in family.samples}


def test_what_the_service_says_of_its_passes(samples: dict[tuple[str, str], float]) -> None:
    """By phase; K/V; losses; the build."""
    assert samples["moeplace_pass_seconds_total", "prefill"] == 1.5
    assert samples["moeplace_passes_total", "decode"] == 8
    assert samples["moeplace_kv_positions", "used"] / samples["moeplace_kv_positions", "room"] == 0.25
    assert samples["moeplace_losses_total", ""] == 2
    assert any(name == "moeplace_build_info" for name, _ in samples)


def test_what_is_not_exact_is_told(samples: dict[tuple[str, str], float]) -> None:
    """Experts by precision and the predicted error, as the health check says them; without a plan, that nothing is."""
    assert samples["moeplace_inexact", ""] == 1
    assert samples["moeplace_predicted_error", ""] == 0.25
    assert {p: n for (name, p), n in samples.items() if name == "moeplace_experts"} == PLAN["experts"]
    for plan in ("exact", {"experts": {"exact": 8, "int8": 0}, "predicted_error": 0.0}):
        text = FrontMetrics(ManualService(), FairQueue(1, 0), precision=plan).render().decode()
        assert "moeplace_inexact 0.0\n" in text
        assert "moeplace_predicted_error 0.0\n" in text
        assert ("moeplace_experts{" in text) == (plan != "exact")


def test_names_keep_to_the_conventions(samples: dict[tuple[str, str], float]) -> None:
    """Prometheus': a prefix, base units at the end, _total for what only rises."""
    for name in {name for name, _ in samples}:
        assert re.fullmatch(r"moeplace_[a-z_]+", name), name
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name), name
        if "bytes" in name or "seconds" in name:
            assert re.search(r"_(bytes|seconds)(_total|_bucket|_count|_sum|_created)?$", name), name


def test_the_dashboard_shows_what_there_is(samples: dict[tuple[str, str], float]) -> None:
    """Every metric of an expression exists, and every metric but those of counting itself is shown."""
    document = json.loads(GRAFANA.read_text())
    expressions = " ".join(target["expr"] for panel in document["panels"] for target in panel["targets"])
    shown, known = set(re.findall(r"moeplace_\w+", expressions)), {name for name, _ in samples}
    assert shown <= known, shown - known
    stems = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in known if not name.endswith("_created")}
    left = {stem for stem in stems if not any(name.startswith(stem) for name in shown)}
    assert left <= {"moeplace_migration_commits", "moeplace_migration_under_way"}, left
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
