"""What is measured of requests, in Prometheus' terms. Counted in plain numbers, and put into words when scraped."""

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.refusal import Code
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

    def add(self, state: Mapping[str, Any]) -> None:
        """Count what another tally of the same bounds counted, as its `state` says."""
        self._counts = [own + other for own, other in zip(self._counts, state["counts"], strict=True)]
        self._sum += state["sum"]

    def state(self) -> dict[str, Any]:
        """Return what was counted, as JSON can tell it."""
        return {"counts": list(self._counts), "sum": self._sum}

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """Return the histogram that is scraped."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


@dataclass
class Counted:
    """What was counted of the answers of one process, or of several together."""

    requests: Counts[int] = field(default_factory=Counts)
    request_seconds: Tally = field(default_factory=lambda: Tally(_SECONDS))
    batch_rows: Tally = field(default_factory=lambda: Tally(_ROWS))
    queue_seconds: Tally = field(default_factory=lambda: Tally(_SECONDS))
    forward_seconds: Tally = field(default_factory=lambda: Tally(_SECONDS))
    failures: Counts[str] = field(default_factory=Counts)
    refused: Counts[str] = field(default_factory=Counts)
    waiting: int = 0
    in_flight: int = 0

    def state(self) -> dict[str, Any]:
        """Return it as JSON can tell it."""
        return {
            "requests": {str(status): count for status, count in self.requests.items()},
            "request_seconds": self.request_seconds.state(),
            "batch_rows": self.batch_rows.state(),
            "queue_seconds": self.queue_seconds.state(),
            "forward_seconds": self.forward_seconds.state(),
            "failures": dict(self.failures),
            "refused": dict(self.refused),
            "waiting": self.waiting,
            "in_flight": self.in_flight,
        }

    def add(self, state: Mapping[str, Any]) -> Self:
        """Add what another process counted, as its `state` says."""
        self.requests.update({int(status): count for status, count in state["requests"].items()})
        self.request_seconds.add(state["request_seconds"])
        self.batch_rows.add(state["batch_rows"])
        self.queue_seconds.add(state["queue_seconds"])
        self.forward_seconds.add(state["forward_seconds"])
        self.failures.update(state["failures"])
        self.refused.update(state["refused"])
        self.waiting += state["waiting"]
        self.in_flight += state["in_flight"]
        return self

    def families(self) -> Iterator[Metric]:
        """Return the metrics that are scraped."""
        requests = CounterMetricFamily(
            "emaswap_requests", "Answers to requests for predictions, by HTTP status.", labels=["status"]
        )
        for status, answers in sorted(self.requests.items()):
            requests.add_metric([str(status)], answers)
        yield requests
        yield self.request_seconds.family("emaswap_request_seconds", "Time from a request's first byte to its answer.")
        yield self.queue_seconds.family(
            "emaswap_queue_seconds", "Time from the first byte of a batch's oldest request to the batch's start."
        )
        yield self.forward_seconds.family("emaswap_forward_seconds", "Time that the model took for a batch.")
        yield self.batch_rows.family("emaswap_batch_rows", "Rows that ran through the model at once.")
        refused = CounterMetricFamily(
            "emaswap_refused_requests", "Requests for predictions that were refused, by error.", labels=["error"]
        )
        for code in Code:
            refused.add_metric([str(code)], self.refused[code])
        yield refused
        failures = CounterMetricFamily(
            "emaswap_forward_failures",
            "Forward passes that failed, by cause: memory, request, version, timeout.",
            labels=["cause"],
        )
        for cause in Cause:
            failures.add_metric([str(cause)], self.failures[cause])
        yield failures
        yield GaugeMetricFamily("emaswap_waiting_requests", "Requests waiting for the model.", value=self.waiting)
        yield GaugeMetricFamily(
            "emaswap_in_flight_requests", "Requests that wait for the model or run through it.", value=self.in_flight
        )


class ServingMetrics(Collector):
    """The metrics of one process's answers."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Register the metrics, where they are to be scraped in this process."""
        self._counted = Counted()
        self.waiting: Callable[[], int] = lambda: 0
        self.in_flight: Callable[[], int] = lambda: 0
        if registry is not None:
            registry.register(self)

    @property
    def counted(self) -> Counted:
        """What was counted so far."""
        self._counted.waiting = self.waiting()
        self._counted.in_flight = self.in_flight()
        return self._counted

    def answered(self, status: int, seconds: float) -> None:
        """Note that a request for a prediction was answered."""
        self._counted.requests[status] += 1
        self._counted.request_seconds.observe(seconds)

    def begins(self, rows: int, waited_s: float) -> None:
        """Note that so many rows run through the model at once, and how long the oldest request had waited."""
        self._counted.batch_rows.observe(rows)
        self._counted.queue_seconds.observe(waited_s)

    def computed(self, seconds: float) -> None:
        """Note how long the model took for a batch."""
        self._counted.forward_seconds.observe(seconds)

    def refused(self, code: Code) -> None:
        """Note that a request was refused."""
        self._counted.refused[code] += 1

    def failed(self, cause: Cause) -> None:
        """Note that a forward pass failed."""
        self._counted.failures[cause] += 1

    def collect(self) -> Iterator[Metric]:
        """Return what was counted."""
        return self.counted.families()
