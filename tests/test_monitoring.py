"""Monitoring: what Prometheus' own tools say of our files, and what a real Prometheus makes of a running service."""

import functools
import json
import math
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from emaswap import Architecture, DirectoryStore, Publisher
from tests.conftest import Publish
from tests.models import Linear
from tests.serving import ROOT, Served, serve, wait_for

PROMETHEUS = ROOT / "docker/prometheus"
GRAFANA = ROOT / "docker/grafana"
ALERTS = (PROMETHEUS / "alerts.yml").read_text()
ALERT_NAMES = re.findall(r"- alert: (\w+)", ALERTS)
PANELS: list[dict[str, Any]] = json.loads((GRAFANA / "dashboards/emaswap.json").read_text())["panels"]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed; Debian's package `prometheus` has both",
)


def _replace(text: str, *replacements: tuple[str, str]) -> str:
    """The text with each pattern replaced, none of which may be missing from it."""
    for pattern, new in replacements:
        text, count = re.subn(pattern, new, text)
        assert count, f"nothing matches {pattern!r}"
    return text


def _files(folder: Path) -> Path:
    """Our configuration, which finds our alerts beside it."""
    (folder / "alerts.yml").write_text(ALERTS)
    config = folder / "prometheus.yml"
    config.write_text(
        _replace(
            (PROMETHEUS / "prometheus.yml").read_text(),
            (re.escape("/etc/prometheus/alerts.yml"), str(folder / "alerts.yml")),
        )
    )
    return config


def _hasten(config: Path, target: str) -> None:
    """Watch this address twice a second, call weights stale after 4 s, and tell of everything at once."""
    config.write_text(
        _replace(config.read_text(), (re.escape("service:8000"), target), (r"(?<=_interval: )5s", "500ms"))
    )
    rules = config.parent / "alerts.yml"
    rules.write_text(
        _replace(rules.read_text(), (r"(?<=live_age_seconds > )600\b", "4"), (r"(?<=\bfor: )\w+", "0s")),
    )


def _promtool(*arguments: str | Path, stdin: str | None = None) -> str:
    """What promtool has to say, on both streams, where it is content."""
    done = subprocess.run(
        ["promtool", *arguments], input=stdin, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Prometheus:
    """A running Prometheus as its users see it."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)

    def get(self, path: str, **parameters: str) -> Any:
        """The data that a path of its API answers with."""
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression comes to now, for each series that it has a number for."""
        numbers = [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]
        return [number for number in numbers if not math.isnan(number)]

    def sees(self, expression: str, value: float) -> bool:
        """Whether an expression comes to just one number, and to this."""
        return self.values(expression) == [value]

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def answers(self) -> bool:
        """Whether it is there and has read its files."""
        try:
            return self.client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def watch(url: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that watches a service, with our files but for shorter times."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = _files(folder)
    _hasten(config, target=url.removeprefix("http://"))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}", "--log.level=warn"],
            env=os.environ | {"GOMAXPROCS": "2"},
            stdout=log,
            stderr=log,
        )
    prometheus = Prometheus(f"http://{address}")
    try:
        with prometheus.client:
            wait_for(lambda: prometheus.answers() or process.poll() is not None, what="Prometheus' start")
            assert process.poll() is None, (folder / "log").read_text()
            wait_for(lambda: prometheus.sees("up", 1), what="the first scrape")
            yield prometheus
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Watched:
    """A service, the publisher that it follows, and the Prometheus that watches it."""

    served: Served
    publisher: Publisher
    prometheus: Prometheus

    def publish(self) -> int:
        """Publish fresh weights, and return their version once it is live."""
        self.publisher.publish(Linear(), step=0)
        self.publisher.flush()
        version = self.publisher.store.newest()
        self.served.wait_until_live(version)
        return version


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One for all tests here: Prometheus takes five seconds to turn to its targets."""
    folder = tmp_path_factory.mktemp("monitoring")
    store = DirectoryStore(folder / "store")
    store.prepare()
    with (
        serve(store=str(store.root), poll_s=0.05) as served,
        watch(served.url, folder) as prometheus,
        Publisher(store, name="test", architecture=Architecture.of(Linear), probe=torch.ones(2, 3)) as publisher,
    ):
        yield Watched(served, publisher, prometheus)


@needs_prometheus
def test_promtool_has_no_complaint_about_the_metrics(served: Served, publish: Publish) -> None:
    """The names, types and help of all that /metrics answers are as Prometheus would have them."""
    served.wait_until_live(publish().version)
    assert served.predict([[1.0, 2.0, 3.0]]).status_code == 200
    assert served.predict("no rows").status_code == 422
    body = served.client.get("/metrics").text
    assert 'emaswap_requests_total{status="422"}' in body
    assert _promtool("check", "metrics", stdin=body) == ""


@needs_prometheus
def test_promtool_has_no_complaint_about_the_configuration(tmp_path: Path) -> None:
    """Prometheus reads the configuration, and finds the alerts through it."""
    said = _promtool("check", "config", _files(tmp_path))
    assert "1 rule files found" in said
    assert not re.search("warn|fail|error", said, re.IGNORECASE), said


@needs_prometheus
def test_promtool_has_no_complaint_about_the_alerts() -> None:
    """Prometheus reads every alert."""
    said = _promtool("check", "rules", PROMETHEUS / "alerts.yml")
    assert f"SUCCESS: {len(ALERT_NAMES)} rules found" in said
    assert not re.search("warn|fail|error", said, re.IGNORECASE), said


@needs_prometheus
def test_each_alert_fires_when_it_should_and_clears() -> None:
    """The alerts' own unit tests pass."""
    assert "FAILED" not in _promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_each_alert_has_a_unit_test_of_firing_and_of_being_silent() -> None:
    """alerts_test.yml has each alert both firing, with its labels and texts, and not."""
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    firing = re.findall(r"- alertname: (\w+)\n +eval_time: \w+\n +exp_alerts:\n +- exp_labels", tests)
    silent = re.findall(r"alertname: (\w+), eval_time: \w+, exp_alerts: \[\]", tests)
    assert set(firing) == set(silent) == set(ALERT_NAMES)


@needs_prometheus
def test_prometheus_sees_which_version_is_live(watched: Watched) -> None:
    """The service is up in Prometheus' eyes, and its live version follows what is published."""
    wait_for(lambda: watched.prometheus.sees('up{job="emaswap"}', 1), what="up")
    for _ in range(2):
        version = float(watched.publish())
        wait_for(functools.partial(watched.prometheus.sees, "emaswap_live_version", version), what=f"{version=}")


@needs_prometheus
def test_stale_weights_are_told_of_until_the_next_version(watched: Watched) -> None:
    """Where nothing is published for long the alert fires, and the next version clears it."""
    watched.publish()
    wait_for(lambda: "EmaswapStaleWeights" not in watched.prometheus.firing(), what="fresh weights")
    wait_for(lambda: "EmaswapStaleWeights" in watched.prometheus.firing(), what="stale weights")
    watched.publish()
    wait_for(lambda: "EmaswapStaleWeights" not in watched.prometheus.firing(), what="fresh weights again")


@needs_prometheus
def test_prometheus_can_evaluate_every_alert(watched: Watched) -> None:
    """On what a service with versions and requests measures, no alert's expression fails."""
    _use(watched)
    began = datetime.now(UTC)

    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
        return rules if all(datetime.fromisoformat(rule["lastEvaluation"]) > began for rule in rules) else []

    rules = wait_for(evaluated, what="evaluation")
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in rules} == dict.fromkeys(
        ALERT_NAMES, ("ok", None)
    )


@needs_prometheus
def test_every_panel_has_something_to_show(watched: Watched) -> None:
    """Each panel's expressions come to numbers for a service with versions and requests."""
    for _ in range(2):  # the first load of a stage and the first answer of a status only begin their series
        _use(watched)
    for panel in PANELS:
        expressions = [target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]]
        assert [value for expression in expressions for value in watched.prometheus.values(expression)], panel["title"]


def _use(watched: Watched) -> None:
    """Publish, predict, and wait until Prometheus has seen both."""
    watched.publish()
    assert watched.served.predict([[1.0, 2.0, 3.0]]).status_code == 200
    name = 'emaswap_requests_total{status="200"}'
    answers = watched.served.metric(name)
    wait_for(lambda: watched.prometheus.sees(name, answers), what=f"{answers} answers scraped")


def _used(text: str) -> set[str]:
    return set(re.findall(r"\bemaswap_\w+", text))


@pytest.mark.parametrize(
    "path", ["prometheus/alerts.yml", "prometheus/alerts_test.yml", "grafana/dashboards/emaswap.json"]
)
def test_only_documented_metrics_are_asked_for(path: str) -> None:
    """What an alert or a panel asks for is in docs/metrics.md."""
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    names = {name for name, kind in listed if kind != "histogram"} | {
        f"{name}_{part}" for name, kind in listed if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    used = _used((ROOT / "docker" / path).read_text())
    assert used
    assert used - names == set()


def test_every_panel_asks_the_source_that_is_provided() -> None:
    """The dashboard's source of data is the one that Grafana is given, and is the Prometheus beside it."""
    source = (GRAFANA / "provisioning/datasources/prometheus.yml").read_text()
    assert "url: http://prometheus:9090\n" in source
    assert {f"uid: {panel['datasource']['uid']} " in source for panel in PANELS} == {True}


def test_grafana_looks_for_dashboards_where_compose_mounts_them() -> None:
    """The folder of the provisioned dashboards is that of the mount in compose.yaml."""
    provider = (GRAFANA / "provisioning/dashboards/emaswap.yml").read_text()
    folder = re.findall(r"^ +path: (\S+)", provider, re.MULTILINE)[0]
    assert f"- ./docker/grafana/dashboards:{folder}:ro\n" in (ROOT / "compose.yaml").read_text()


@pytest.mark.parametrize("name", ALERT_NAMES)
def test_each_alert_has_a_section_for_operators(name: str) -> None:
    """docs/operating.md has a heading for the alert, and the alert points to it."""
    assert f"\n### {name}\n" in (ROOT / "docs/operating.md").read_text()
    rule = ALERTS.split(f"- alert: {name}\n")[1].split("- alert:")[0]
    assert f"runbook: docs/operating.md#{name.lower()}\n" in rule
