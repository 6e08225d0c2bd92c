"""What `GET /metrics` tells Prometheus."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Admission

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("characterglm_requests", "Requests, by outcome", ["outcome"], registry=registry)
        self.tokens = Counter("characterglm_generated_tokens", "Tokens generated", registry=registry)
        self.aborted = Counter("characterglm_aborted", "Replies whose client went away", registry=registry)
        self.first_token = Histogram(
            "characterglm_time_to_first_token_seconds",
            "From request to first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "characterglm_time_per_token_seconds", "Between tokens", buckets=TOKEN_SECONDS, registry=registry
        )
        self.in_flight = Gauge("characterglm_requests_in_flight", "Being written or waiting", registry=registry)
        self.queue = Gauge("characterglm_queue_length", "Waiting for a slot", registry=registry)
        self.replicas = Gauge("characterglm_replicas", "Copies of the model that serve", registry=registry)
        self.restarts = Gauge("characterglm_engine_restarts", "Times an engine was started again", registry=registry)

    def render(self, engines: Iterable[Admission], replicas: int) -> bytes:
        """All of it in Prometheus' text format."""
        engines = list(engines)
        self.in_flight.set(sum(engine.in_flight for engine in engines))
        self.queue.set(sum(engine.waiting for engine in engines))
        self.restarts.set(sum(engine.restarts for engine in engines))
        self.replicas.set(replicas)
        return generate_latest(self.registry)


class Stopwatch:
    """When a reply was asked for, began and ended; writes it into the metrics."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.start, self.first, self.tokens = metrics, time.perf_counter(), None, 0

    def note(self, tokens: int) -> None:
        """`tokens` have been generated so far."""
        if self.first is None and tokens:
            self.first = time.perf_counter()
            self.metrics.first_token.observe(self.first - self.start)
        self.metrics.tokens.inc(tokens - self.tokens)
        self.tokens = tokens

    def end(self, outcome: str) -> dict:
        """Count the request and return what a log line tells about it."""
        now = time.perf_counter()
        self.metrics.requests.labels(outcome).inc()
        if outcome == "aborted":
            self.metrics.aborted.inc()
        if self.tokens > 1:
            self.metrics.per_token.observe((now - self.first) / (self.tokens - 1))
        first = self.first and round(self.first - self.start, 4)
        return {
            "outcome": outcome,
            "new_tokens": self.tokens,
            "first_token_seconds": first,
            "seconds": round(now - self.start, 4),
        }
