"""What the service measures, in Prometheus' terms. Each application has a registry of its own."""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from emaswap import Pin, Reason, __version__
from service.serving.failure import Cause
from service.serving.servable import Servable
from service.serving.slot import Slot

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one service."""

    def __init__(self, slot: Slot) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nobody plots them
        self.registry = registry = CollectorRegistry()
        Gauge("emaswap_info", "1, labelled with the release of emaswap.", ["release"], registry=registry).labels(
            __version__
        ).set(1)

        self.live_version = Gauge(
            "emaswap_live_version", "The version that answers; 0 before the first.", registry=registry
        )
        self.live_step = Gauge("emaswap_live_step", "The training step of the live version.", registry=registry)
        self.newest_version = Gauge("emaswap_newest_version", "The newest version in the store.", registry=registry)
        self.pinned_version = Gauge("emaswap_pinned_version", "The pinned version; 0 without a pin.", registry=registry)
        self.live_age = Gauge(
            "emaswap_live_age_seconds",
            "Time since the live version was published; NaN before the first.",
            registry=registry,
        )
        self.live_age.set_function(lambda: _age_s(slot))
        self.publish_to_served = Histogram(
            "emaswap_publish_to_served_seconds",
            "From a version's commit to it being live.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.swaps = Counter("emaswap_swaps", "Times a version went live.", registry=registry)
        self.rejected = Counter(
            "emaswap_rejected_versions", "Versions rejected, by reason.", ["reason"], registry=registry
        )
        for reason in Reason:
            self.rejected.labels(reason=reason)
        self.load = Histogram(
            "emaswap_load_seconds", "Time to load a version, by stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.drift = Gauge(
            "emaswap_drift",
            "Mean |difference| of the live version's answers to its probe from its predecessor's.",
            registry=registry,
        )
        self.store_errors = Counter("emaswap_store_errors", "Looks at the store that failed.", registry=registry)

        self.requests = Counter(
            "emaswap_requests", "Answers of /predict, by HTTP status.", ["status"], registry=registry
        )
        self.request_seconds = Histogram(
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

    def saw(self, newest: int, pin: Pin | None) -> None:
        """What the store holds."""
        self.newest_version.set(newest)
        self.pinned_version.set(pin.version if pin else 0)

    def went_live(self, servable: Servable, timings_s: Mapping[str, float]) -> None:
        """A version went live."""
        self.swaps.inc()
        self.live_version.set(servable.version)
        self.live_step.set(servable.manifest.training.step)
        self.publish_to_served.observe(max(0.0, servable.publish_to_served_s))
        self.drift.set(servable.drift or 0.0)
        for stage, seconds in timings_s.items():
            self.load.labels(stage=stage).observe(seconds)

    def answered(self, status: int, seconds: float) -> None:
        """A request to /predict was answered."""
        self.requests.labels(status=status).inc()
        self.request_seconds.observe(seconds)

    def render(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self.registry)


def _age_s(slot: Slot) -> float:
    live = slot.current
    return time.time() - live.manifest.created_at.timestamp() if live else float("nan")
