"""The documentation says what is so: its lists are compared with the code, and its examples are run."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.routing import APIRoute
from prometheus_client.metrics_core import Metric
from pydantic_settings import BaseSettings

from emaswap import DirectoryStore, Reason, __version__
from service.parts import Service
from service.refusal import Code
from service.settings import ServiceSettings
from service.web.app import create_app
from service.web.refused import STATUS
from tests.models import Net
from tests.programs import ROOT, run
from trainer.settings import TrainerSettings

README = (ROOT / "README.md").read_text()


def _table(path: str, heading: str = "") -> list[list[str]]:
    """The rows of the first table below a heading, without its own heading and rule."""
    text = (ROOT / path).read_text()
    section = text[text.index(f"\n{heading}\n") :] if heading else text
    match = re.search(r"(?:^\|.*\|$\n?)+", section, re.MULTILINE)
    assert match, f"no table under {heading!r} in {path}"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[0].strip().splitlines()]
    return rows[2:]


def _settings(settings: type[BaseSettings]) -> Iterator[list[str]]:
    for name, field in settings.model_fields.items():
        default = (
            "required" if field.is_required() else f"`{field.default}`" if field.default not in (None, ()) else "none"
        )
        yield [f"`--{name.replace('_', '-')}`", f"`EMASWAP_{name.upper()}`", default, field.description or ""]


@pytest.mark.parametrize(
    ("settings", "heading"),
    [(TrainerSettings, "## `python -m trainer`"), (ServiceSettings, "## `python -m service`")],
    ids=["trainer", "service"],
)
def test_every_setting_is_listed(settings: type[BaseSettings], heading: str) -> None:
    """docs/settings.md has each flag with its variable, default and description."""
    assert _table("docs/settings.md", heading) == list(_settings(settings))


def _metrics() -> Iterator[Metric]:
    yield from Service(ServiceSettings(store="nowhere")).registry.collect()


def test_every_metric_is_listed() -> None:
    """docs/metrics.md has each metric under the name that it is scraped by, with its type and meaning."""
    listed = _table("docs/metrics.md")
    suffix = {"counter": "_total"}
    assert listed == [
        [f"`{metric.name}{suffix.get(metric.type, '')}`", metric.type, metric.documentation] for metric in _metrics()
    ]


def test_every_reason_is_listed() -> None:
    """docs/store.md has each reason for which a version is rejected."""
    assert [row[0] for row in _table("docs/store.md", "## Reasons for rejection")] == [
        f"`{reason}`" for reason in Reason
    ]


def test_every_error_is_listed() -> None:
    """docs/http.md has each error code with its status."""
    assert [row[:2] for row in _table("docs/http.md", "## Errors")] == [
        [str(STATUS[code]), f"`{code}`"] for code in Code
    ]


def test_every_route_is_listed(tmp_path: Path) -> None:
    """docs/http.md has each route, and the OpenAPI document has it, too."""
    app = create_app(ServiceSettings.model_validate({"store": str(tmp_path)}))
    documented = {
        f"`{method.upper()} {path}`" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    assert {row[0] for row in _table("docs/http.md", "## Routes")} == documented
    assert any(isinstance(route, APIRoute) and route.path == "/predict" for route in app.routes)


def test_the_tree_has_every_file() -> None:
    """The README's tree names each file of the packages once, and no other."""
    block = README[README.index("## What is where") :].split("```")[1]
    named, folders = [], [Path()]
    for line in block.strip().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        del folders[depth + 1 :]
        if name.endswith("/"):
            folders.append(folders[depth] / name)
        else:
            named.append(folders[depth] / name)
    there = [
        path.relative_to(ROOT)
        for package in ("emaswap", "trainer", "service")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert sorted(named) == sorted([*there, Path("demo.py"), Path("compose.yaml")])


def test_the_lines_for_a_loop_of_your_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example runs as it stands, and publishes."""
    code = README[README.index("## In a training loop of your own") :].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {
        "Net": Net,
        "model": Net(width=32),
        "inputs": torch.zeros(2, 32),
        "batches": range(200),
        "train_step": lambda model, batch: None,
    }
    exec(code, names)
    assert DirectoryStore(tmp_path / "store").newest() >= 1


def test_make_lists_its_targets() -> None:
    """Every target that the README speaks of is there."""
    listed = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", README)):
        assert f"make {target}" in listed


def test_the_changelog_has_this_release() -> None:
    """CHANGELOG.md has a heading for the release in emaswap/release.py."""
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["trainer", "service"])
def test_help_is_there_and_a_wrong_flag_is_named(module: str) -> None:
    """`--help` ends with 0 and names the store; a value out of range ends with 2 and names its flag."""
    assert "--store" in run("-m", module, "--help", check=True).stdout
    wrong = run("-m", module, "--store", "x", "--threads", "-1")
    assert wrong.returncode == 2
    assert "--threads" in wrong.stderr
