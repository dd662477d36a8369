"""What is measured of versions, in Prometheus' terms: which is live, how fresh it is, how loading goes."""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from emaswap import Reason
from service.control.lifecycle import Record, State
from service.control.standing import Standing
from service.serving.servable import Served
from service.serving.slot import Slot

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ControlMetrics:
    """The metrics of a service's control."""

    def __init__(self, registry: CollectorRegistry, slot: Slot[Any]) -> None:
        """Register the metrics; `slot` is asked for the age of the live version at each scrape."""
        Gauge(
            "emaswap_live_version", "The version that answers; 0 when there is none.", registry=registry
        ).set_function(lambda: slot.current.version if slot.current else 0)
        Gauge(
            "emaswap_live_step", "The training step of the live version; NaN when there is none.", registry=registry
        ).set_function(lambda: slot.current.manifest.training.step if slot.current else math.nan)
        self._live_in_store = Gauge(
            "emaswap_live_in_store",
            "1 while the store has the live version as itself, 0 when it is gone or another has its number; NaN before the first.",
            registry=registry,
        )
        self._live_in_store.set(math.nan)
        self._newest_version = Gauge("emaswap_newest_version", "The newest version in the store.", registry=registry)
        self._pinned_version = Gauge(
            "emaswap_pinned_version", "The pinned version; 0 without a pin.", registry=registry
        )
        Gauge(
            "emaswap_live_age_seconds",
            "Time since the live version was published; NaN before the first.",
            registry=registry,
        ).set_function(lambda: _age_s(slot))
        self._clock_skew = Gauge(
            "emaswap_clock_skew_seconds",
            "By how much the publisher's clock was ahead of this one at least, when the live version was loaded.",
            registry=registry,
        )
        self._publish_to_served = Histogram(
            "emaswap_publish_to_served_seconds",
            "From a version's commit to it being live.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._swaps = Counter("emaswap_swaps", "Times a version went live.", registry=registry)
        self.rollbacks = Counter(
            "emaswap_rollbacks",
            "Times the version before was live again because the live one failed.",
            registry=registry,
        )
        self.rejected = Counter(
            "emaswap_rejected_versions", "Versions rejected, by reason.", ["reason"], registry=registry
        )
        for reason in Reason:
            self.rejected.labels(reason=reason)
        self.load_retries = Counter(
            "emaswap_load_retries", "Loads that failed for now and are tried again.", registry=registry
        )
        self.hung_loads = Gauge("emaswap_hung_loads", "Loads that were given up and still hang.", registry=registry)
        self._load = Histogram(
            "emaswap_load_seconds", "Time to load a version, by stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._drift = Gauge(
            "emaswap_drift",
            "Mean |difference| of the live version's answers to its probe from its predecessor's.",
            registry=registry,
        )
        self._versions = Gauge("emaswap_versions", "Versions known of, by state.", ["state"], registry=registry)
        self.store_errors = Counter("emaswap_store_errors", "Looks at the store that failed.", registry=registry)

    def know(self, records: Callable[[], Iterable[Record]]) -> None:
        """Ask for the records of versions at each scrape."""
        for state in State:
            self._versions.labels(state=state).set_function(
                lambda state=state: sum(record.state is state for record in records())  # type: ignore[misc]
            )

    def saw(self, standing: Standing) -> None:
        """Note what a look at the store showed."""
        self._newest_version.set(standing.newest)
        self._pinned_version.set(standing.pin.version if standing.pin else 0)
        self._live_in_store.set(math.nan if standing.in_store is None else standing.in_store)

    def went_live(self, servable: Served, timings_s: Mapping[str, float]) -> None:
        """Note that a version went live."""
        self._swaps.inc()
        self._live_in_store.set(1)
        self._clock_skew.set(servable.manifest.skew_s(servable.loaded_at))
        self._publish_to_served.observe(servable.publish_to_served_s)
        self._drift.set(servable.drift or 0.0)
        for stage, seconds in timings_s.items():
            self._load.labels(stage=stage).observe(seconds)


def _age_s(slot: Slot[Any]) -> float:
    live = slot.current
    return live.manifest.age_s(datetime.now(UTC)) if live else math.nan
