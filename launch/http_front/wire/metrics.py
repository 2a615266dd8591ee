"""FrontMetrics: what Prometheus reads. The number of series does not depend on the model, the ranks or the clients.

Requests and latencies are counted by the front; everything else is asked of the service when someone looks.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeplace.runtime.counters import TIERS
from moeplace.runtime.service.api import Service, ServiceStatus

OUTCOMES = ("stop", "length", "cancelled", "failed")
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PHASES = ("prefill", "decode")
_MOST_KINDS = 32
"""Kinds of collectives that get a series of their own; the runtime has fewer."""


class Places(Protocol):
    """Completions under way and those that wait, as they are now (see `FairQueue`)."""

    running: int
    waiting: int


class FrontMetrics:
    """See the module.

    Attributes:
        completions: by outcome.
        http_requests: by route and status.
        request_seconds: from the first byte of a request to the last of its answer.
        queue_seconds: how long requests have waited so.
    """

    def __init__(self, service: Service, places: Places, *, model: str = "", precision: Any = "exact") -> None:
        """`precision`: "exact", or what is not, as the health check says it."""
        self._registry = registry = CollectorRegistry()
        build = Info("moeplace_build", "What runs here", registry=registry)
        build.info({"version": version("moeplace"), "model": model})
        self.completions = Counter(
            "moeplace_completions", "Completions by how they ended", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self.completions.labels(outcome)
        self.http_requests = Counter("moeplace_http_requests", "Answers", ["route", "status"], registry=registry)
        self.generated = Counter("moeplace_generated_tokens", "Tokens given to this front", registry=registry)
        self.prompt = Counter("moeplace_prompt_tokens", "Prompt tokens of accepted requests", registry=registry)
        # Asked when the page is: whoever kept a copy would have to notice everything that changes them.
        in_flight = Gauge("moeplace_completions_in_flight", "Completions being answered", registry=registry)
        in_flight.set_function(lambda: places.running)
        waiting = Gauge("moeplace_completions_waiting", "Completions that wait for a place", registry=registry)
        waiting.set_function(lambda: places.waiting)
        self.queue_seconds = Histogram(
            "moeplace_queue_seconds", "Seconds that requests wait for a place", buckets=_FIRST, registry=registry
        )
        self.request_seconds = Histogram(
            "moeplace_request_seconds", "Seconds of completion requests", buckets=_WHOLE, registry=registry
        )
        self._first_seconds = Histogram(
            "moeplace_time_to_first_token_seconds", "Seconds to the first token", buckets=_FIRST, registry=registry
        )
        self._next_seconds = Histogram(
            "moeplace_time_per_token_seconds", "Seconds between tokens", buckets=_NEXT, registry=registry
        )
        _add_precision(registry, precision if isinstance(precision, Mapping) else {})
        registry.register(_ServiceCollector(service))

    def saw_tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """`count` tokens of a completion, `seconds` after those before them (or after the request)."""
        self.generated.inc(count)
        if first:
            self._first_seconds.observe(seconds)
            return
        for _ in range(count):
            self._next_seconds.observe(seconds / count)

    def render(self) -> bytes:
        """In Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


def _add_precision(registry: CollectorRegistry, plan: Mapping[str, Any]) -> None:
    """What is not exact, which does not change while a service lives; `plan` is empty where everything is."""
    counts, error = plan.get("experts", {}), plan.get("predicted_error", 0.0)
    inexact = Gauge("moeplace_inexact", "1 = some experts have other numbers than the checkpoint's", registry=registry)
    inexact.set(float(any(count for name, count in counts.items() if name != "exact")))
    predicted = Gauge(
        "moeplace_predicted_error",
        "Predicted error of layers, squared; 0 = exact",
        registry=registry,
    )
    predicted.set(error)
    experts = Gauge("moeplace_experts", "Experts by precision, under a plan", ["precision"], registry=registry)
    for name, count in counts.items():
        experts.labels(name).set(count)


class _ServiceCollector(Collector):
    """The service's status as metrics, made anew whenever someone looks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the service

    def collect(self) -> Iterator[Metric]:
        status = self._service.status()
        yield _gauge("serving", "1 = requests are taken", float(status.serving))
        yield _gauge("generation", "Counter of memberships", status.generation)
        yield _gauge("placement_version", "Counter of placements in force", status.placement_version)
        yield _members(status)
        requests = GaugeMetricFamily("moeplace_requests", "Requests in the service", labels=["state"])
        requests.add_metric(["waiting"], status.waiting)
        requests.add_metric(["running"], status.running)
        yield requests
        yield CounterMetricFamily("moeplace_steps", "Passes", value=status.steps)
        yield CounterMetricFamily("moeplace_tokens", "Tokens generated by the service", value=status.tokens)
        yield from _passes(status)
        yield CounterMetricFamily("moeplace_losses", "Ranks that were lost", value=status.losses)
        yield _imbalance(status.imbalance_per_layer)
        yield from _counters(status.counters)
        yield from _migration(status)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moeplace_{name}", text, value=value)


def _members(status: ServiceStatus) -> Metric:
    members = GaugeMetricFamily("moeplace_members", "Members by state", labels=["state"])
    members.add_metric(["desired"], status.desired)
    for state in ("allocated", "active", "routable"):
        members.add_metric([state], len(getattr(status, state)))
    return members


def _passes(status: ServiceStatus) -> Iterator[Metric]:
    passes = CounterMetricFamily("moeplace_passes", "Passes of the ranks, by phase", labels=["phase"])
    seconds = CounterMetricFamily("moeplace_pass_seconds", "Seconds of those passes", labels=["phase"])
    for phase in _PHASES:
        passes.add_metric([phase], status.passes.get(phase, 0))
        seconds.add_metric([phase], status.pass_seconds.get(phase, 0.0))
    yield from (passes, seconds)
    positions = GaugeMetricFamily("moeplace_kv_positions", "Positions of the K/V caches", labels=["state"])
    positions.add_metric(["used"], status.kv_used)
    positions.add_metric(["room"], status.kv_room)
    yield positions


def _imbalance(values_L: Sequence[float]) -> Metric:
    """Of all layers, the mean, the middle and the worst: a series per layer would be dozens of them."""
    ordered = sorted(values_L) or [1.0]
    imbalance = GaugeMetricFamily(
        "moeplace_layer_imbalance", "Busiest rank / mean over ranks of routed tokens, over MoE layers", labels=["over"]
    )
    imbalance.add_metric(["mean"], sum(ordered) / len(ordered))
    imbalance.add_metric(["median"], ordered[len(ordered) // 2])
    imbalance.add_metric(["worst"], ordered[-1])
    return imbalance


def _counters(counters: Mapping[str, object]) -> Iterator[Metric]:
    sent = counters.get("bytes_sent")
    tiers = CounterMetricFamily("moeplace_sent_bytes", "Bytes that ranks sent, by tier", labels=["tier"])
    for tier in TIERS:
        tiers.add_metric([tier], float(sent.get(tier, 0)) if isinstance(sent, Mapping) else 0.0)
    yield tiers
    by_kind = counters.get("collectives")
    collectives = CounterMetricFamily("moeplace_collectives", "Collectives of all ranks, by kind", labels=["kind"])
    if isinstance(by_kind, Mapping):
        for kind in sorted(by_kind)[:_MOST_KINDS]:
            collectives.add_metric([str(kind)], float(by_kind[kind]))
    yield collectives
    for name, text in (
        ("copies_sent", "Token rows dispatched to other ranks"),
        ("tokens_computed", "Assignments (token, expert) computed"),
        ("single_exchange", "Coherent layer passes in which one exchange was enough"),
        ("overflows", "Layer passes with an extra round"),
        ("tokens_reused", "Tokens of prompts whose K/V were taken over, not run"),
    ):
        value = counters.get(name)
        if isinstance(value, int | float):
            yield CounterMetricFamily(f"moeplace_{name}", text, value=value)


def _migration(status: ServiceStatus) -> Iterator[Metric]:
    progress = status.migration or {}
    yield _gauge("migration_under_way", "1 = experts are moving", float(status.migration is not None))
    for name, key, text in (
        ("moved_bytes", "bytes_moved", "Bytes that have arrived"),
        ("planned_bytes", "bytes_planned", "Bytes of the whole plan"),
        ("commits", "commits", "Switches so far"),
    ):
        value = float(progress.get(key, 0) or 0)
        yield _gauge(f"migration_{name}", f"{text}, of the re-placement under way", value)
