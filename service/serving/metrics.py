"""What is measured of requests, in Prometheus' terms."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.serving.failure import Cause

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServingMetrics:
    """The metrics of a service's answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "emaswap_requests", "Answers of /predict, by HTTP status.", ["status"], registry=registry
        )
        self._request_seconds = Histogram(
            "emaswap_request_seconds",
            "Time from a request's first byte to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "emaswap_batch_rows", "Rows that ran through the model at once.", buckets=_ROWS, registry=registry
        )
        self.forward_failures = Counter(
            "emaswap_forward_failures",
            "Forward passes that failed, by cause: memory, request, version, timeout.",
            ["cause"],
            registry=registry,
        )
        for cause in Cause:
            self.forward_failures.labels(cause=cause)
        self.waiting = Gauge("emaswap_waiting_requests", "Requests waiting for the model.", registry=registry)

    def answered(self, status: int, seconds: float) -> None:
        """Note that a request to /predict was answered."""
        self._requests.labels(status=status).inc()
        self._request_seconds.observe(seconds)
