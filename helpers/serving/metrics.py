"""What `GET /metrics` tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters, histograms and gauges of one `Service`, in a registry of their own."""

    def __init__(self, service):
        def counter(name, *words, **options):
            return Counter(f"characterglm_{name}", *words, registry=self.registry, **options)

        def gauge(name, text, attribute):
            total = Gauge(f"characterglm_{name}", text, registry=self.registry)
            total.set_function(lambda: sum(getattr(engine, attribute) for engine in service.engines.values()))

        def histogram(name, text, buckets):
            return Histogram(f"characterglm_{name}_seconds", text, buckets=buckets, registry=self.registry)

        self.registry = CollectorRegistry()
        self.requests = counter("requests", "Requests, by outcome", ["outcome"])
        self.tokens = counter("generated_tokens", "Tokens generated")
        self.aborted = counter("aborted", "Replies whose client went away")
        self.first_token = histogram("time_to_first_token", "From request to first token", SECONDS)
        self.per_token = histogram("time_per_token", "Between tokens", TOKEN_SECONDS)
        gauge("requests_in_flight", "Being written or waiting", "in_flight")
        gauge("queue_length", "Waiting for a slot", "waiting")
        gauge("engine_restarts", "Times an engine was started again", "restarts")
