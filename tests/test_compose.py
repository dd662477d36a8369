"""The compose files stay valid, on any machine, with and without an engine."""

import re
import subprocess
import sys
import tomllib

import pytest

from service.settings import ServiceSettings
from tests.engine import compose_command
from tests.serving import ROOT
from trainer.settings import TrainerSettings


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="alone"),
        pytest.param(["--profile", "monitoring"], id="with monitoring"),
        pytest.param(["--file", "compose.yaml", "--file", "docker/compose.gpu.yaml"], id="with a GPU"),
        pytest.param(["--env-file", ".env.example"], id="with the example's variables"),
    ],
)
def test_compose_takes_the_files(flags: list[str]) -> None:
    """`docker compose config` finds nothing wrong."""
    command = [compose_command(), *flags, "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_variable_of_the_example_is_one() -> None:
    """.env.example names only variables that compose.yaml or an application reads."""
    example = set(re.findall(r"\bEMASWAP_\w+(?==)", (ROOT / ".env.example").read_text()))
    compose = set(re.findall(r"\$\{(EMASWAP_\w+)", (ROOT / "compose.yaml").read_text()))
    fields = {*TrainerSettings.model_fields, *ServiceSettings.model_fields}
    assert example - compose - {f"EMASWAP_{name.upper()}" for name in fields} == set()


def test_both_images_have_what_the_packages_require() -> None:
    """The script that the images are built with prints the requirements that pyproject.toml has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra in ("", "service", "trainer"):
        command = [sys.executable, "docker/requirements.py", *([extra] if extra else [])]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        assert printed.splitlines() == wanted[extra]


def test_grace_periods_are_longer_than_what_they_wait_for() -> None:
    """The service gets more time to stop than it takes to drain and to finish, as the defaults in compose.yaml have it."""
    compose = (ROOT / "compose.yaml").read_text()
    service = compose[compose.index("\n  service:") : compose.index("\n  prometheus:")]
    drain, finish = (int(re.findall(rf"{name}:-(\d+)", service)[0]) for name in ("DRAIN_S", "SHUTDOWN_S"))
    grace = int(re.findall(r"stop_grace_period: (\d+)s", service)[0])
    assert grace > drain + finish
