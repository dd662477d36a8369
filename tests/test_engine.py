"""Trainer and service as containers in a real Docker engine, as `docker compose up` runs them."""

import json
import re
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests import engine
from tests.engine import Project, docker
from tests.serving import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PORT = 18462
ROW = [[[0.5] * 8] * 8]


class Asking:
    """A client that predicts all the while, in a thread, until `stop`."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=10) as client:
            while not self._stop.wait(0.01):
                answer = client.post("/predict", json={"inputs": [ROW]})
                if answer.status_code == httpx.codes.OK:
                    self.versions.append(answer.json()["model"]["version"])
                else:
                    self.failures.append(answer.text)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    """Both images built, and both containers up and healthy; everything is removed at the end."""
    with engine.running():
        project = Project(
            "emaswap-test",
            {
                "EMASWAP_WHEELS_IMAGE": engine.make_wheels_image(),
                "EMASWAP_TAG": "test",
                "EMASWAP_PORT": str(PORT),
                "EMASWAP_PUBLISH_EVERY": "40",
            },
        )
        try:
            project.compose("build")
            project.compose("up", "--wait")
            yield project
        finally:
            project.compose("down", "--volumes", "--timeout", "20", check=False)


def get(path: str) -> httpx.Response:
    """One request on a connection of its own; while nothing listens, an answer 503 stands in for it."""
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}{path}", timeout=10)
    except httpx.TransportError as error:
        return httpx.Response(503, text=repr(error))


def live() -> int:
    version: int = get("/model/version").json()["version"]
    return version


def emaswap(project: Project, *arguments: str) -> str:
    """The `emaswap` command where it may write the store: in the trainer's container."""
    command = ["exec", "-T", "trainer", "python", "-m", "emaswap", arguments[0], "--store", "/store", *arguments[1:]]
    return project.compose(*command)


def test_predictions_are_answered_while_versions_go_by(project: Project) -> None:
    """After `docker compose up --wait`, ten versions and more are served without a failure."""
    asking = Asking()
    try:
        wait_for(lambda: len(set(asking.versions)) > 10 or asking.failures, timeout_s=120, what="ten versions")
    finally:
        asking.stop()
    assert asking.failures == []
    assert asking.versions == sorted(asking.versions)


@pytest.mark.parametrize("service", ["trainer", "service"])
def test_a_container_has_no_rights_that_it_does_not_need(project: Project, service: str) -> None:
    """Seen from inside: no root, no capabilities, no new privileges, a read-only root, limits in force."""
    code = """
import json, os, pathlib
status = dict(line.split(":\\t", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
def writable(folder):
    try:
        pathlib.Path(folder, "probe").write_text("x")
        pathlib.Path(folder, "probe").unlink()
        return True
    except OSError:
        return False
def limit(*files):
    return next(pathlib.Path("/sys/fs/cgroup", f).read_text().strip() for f in files if pathlib.Path("/sys/fs/cgroup", f).exists())
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "writable": [f for f in ("/", "/app", "/opt/venv", "/etc", "/store", "/tmp") if writable(f)],
    "memory": limit("memory.max", "memory/memory.limit_in_bytes"),
    "pids": limit("pids.max", "pids/pids.max"),
}))
"""
    seen = json.loads(project.run_inside(service, code))
    assert seen.pop("uid") == 10001
    assert seen == {
        "capabilities": 0,
        "no_new_privileges": "1",
        "writable": ["/store", "/tmp"] if service == "trainer" else ["/tmp"],
        "memory": str(2 << 30),
        "pids": "256",
    }


@pytest.mark.parametrize("service", ["trainer", "service"])
def test_an_image_has_no_build_tools_and_tells_no_secret(project: Project, service: str) -> None:
    """Neither pip nor a compiler is in the environment, and nothing in the container's settings looks like a secret."""
    code = "import importlib.util as u, shutil; print([bool(u.find_spec('pip')), shutil.which('gcc'), shutil.which('git')])"
    assert project.run_inside(service, code) == "[False, None, None]"
    settings = project.inspect(service, "{{json .Config.Env}} {{json .Config.Labels}} {{json .Config.Cmd}}")
    logs = project.compose("logs", service)
    assert not re.search(r"(?i)token|secret|password|api_?key", settings + logs)


def test_the_training_process_comes_back_where_it_was(project: Project) -> None:
    """SIGKILL of the trainer in its container: it is started again, and training continues at a step it had reached."""
    before = live()
    project.kill_process("trainer")
    wait_for(lambda: "resuming at step" in project.compose("logs", "trainer"), timeout_s=60, what="a resumed run")
    wait_for(lambda: live() > before + 1, timeout_s=60, what="newer versions")
    version = get("/model/version").json()
    resumed = int(re.findall(r"resuming at step (\d+)", project.compose("logs", "trainer"))[-1])
    assert 0 < resumed < version["step"]
    assert version["term"] == 2


def test_the_service_process_comes_back_to_what_is_in_the_store(project: Project) -> None:
    """SIGKILL of the service in its container: it is started again, and answers as soon as it says that it is ready."""
    before = live()
    project.kill_process("service")
    wait_for(lambda: get("/readyz").status_code == 200, timeout_s=60, what="ready again")
    answer = httpx.post(f"http://127.0.0.1:{PORT}/predict", json={"inputs": [ROW]}, timeout=5)
    assert answer.status_code == 200
    assert answer.json()["model"]["version"] >= before


def test_versions_and_pin_outlive_down_and_up(project: Project) -> None:
    """After `down` and `up` the store is what it was: the pinned version answers, whatever is newer."""
    pinned = live()
    assert f"pinned version {pinned}" in emaswap(project, "pin", str(pinned), "--reason", "the good one")
    wait_for(lambda: live() == pinned, what="the pin")
    digest = get("/model/version").json()["digest"]
    project.compose("down", "--timeout", "60")
    project.compose("up", "--wait")
    version = get("/model/version").json()
    assert (version["version"], version["digest"]) == (pinned, digest)
    assert version["pin"]["reason"] == "the good one"
    refused = httpx.delete(f"http://127.0.0.1:{PORT}/model/pin")
    assert refused.status_code == 403
    emaswap(project, "unpin")
    wait_for(lambda: live() > pinned, what="the newest version")


def test_stop_ends_both_with_0_and_a_last_version(project: Project) -> None:
    """`docker compose stop` is well within the grace periods; what training had reached is published."""
    seconds = project.stop()
    statuses = [project.inspect(service, "{{.State.ExitCode}}") for service in ("trainer", "service")]
    assert statuses == ["0", "0"]
    assert seconds < 30
    lines = project.compose("logs", "trainer").splitlines()
    stopped = next(int(line.rpartition(" ")[2]) for line in reversed(lines) if "stopped at step" in line)
    published = [int(found[1]) for line in lines if (found := re.search(r"published version \d+  step (\d+)", line))]
    assert published[-1] == stopped
    project.compose("start")
    wait_for(lambda: get("/readyz").status_code == 200, timeout_s=60, what="ready again")


def test_the_trainers_health_is_the_age_of_its_last_step(project: Project) -> None:
    """A trainer that makes steps is healthy; one whose last step is longer ago than allowed is not."""
    container = project.container("trainer")

    def health(max_age_s: str) -> int:
        setting = f"EMASWAP_HEARTBEAT_MAX_AGE_S={max_age_s}"
        return docker("exec", "--env", setting, container, "python", "-m", "trainer.health", check=False).returncode

    wait_for(lambda: health("5") == 0, timeout_s=60, what="steps")
    assert health("0") == 1
