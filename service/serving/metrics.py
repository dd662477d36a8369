"""What is measured of requests, in Prometheus' terms. Counted in plain numbers, and put into words when scraped."""

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.serving.failure import Cause

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Tally:
    """Counts of values up to each bound, and their sum: a histogram that costs a bisection to fill.

    Filled by one thread alone.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """Return the histogram that is scraped."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class ServingMetrics(Collector):
    """The metrics of a service's answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests: Counts[int] = Counts()
        self._request_seconds = Tally(_SECONDS)
        self.batch_rows = Tally(_ROWS)
        registry.register(self)
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
        """Note that a request for a prediction was answered."""
        self._requests[status] += 1
        self._request_seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Return what was counted."""
        requests = CounterMetricFamily("emaswap_requests", "Answers of /predict, by HTTP status.", labels=["status"])
        for status, answers in sorted(self._requests.items()):
            requests.add_metric([str(status)], answers)
        yield requests
        yield self._request_seconds.family("emaswap_request_seconds", "Time from a request's first byte to its answer.")
        yield self.batch_rows.family("emaswap_batch_rows", "Rows that ran through the model at once.")
