"""The wheel that people install: every module is in it, and it works outside of the tree it was built from."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import pytest

from tests.programs import ROOT
from tests.serving import Served, wait_for

_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[2:]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        assert "pip install" in str(error), (name, error)  # an integration with a framework that is not here
    else:
        assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
"""


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end, which must be a good one, without the variables that lead back into the tree."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=variables, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what a clone has, and of what is about to be committed."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for name in call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    options = ("--quiet", "--no-deps", "--no-build-isolation")
    call(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, tree, cwd=folder)
    return next(folder.glob("emaswap-*.whl"))


def test_every_module_is_in_the_wheel_and_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    """Installed without the tree, but with what it requires, each file of the packages is there and is imported."""
    files = [path for package in ("emaswap", "trainer", "service") for path in (ROOT / package).rglob("*.py")]
    names = sorted(str(path.relative_to(ROOT)) for path in files)
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(name for name in archive.namelist() if name.endswith(".py")) == names
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=tmp_path)
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A path alone: the .pth files over there, this project's own among them, are not followed.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    call(python, "-c", _IMPORT_ALL, packages, *modules, cwd=tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_wheel_trains_and_serves_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """With its extras and nothing else, the commands say what they take, one publishes, and another serves it."""
    call(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    python = binaries / "python"
    options = ("--quiet", "--no-compile", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")
    call(python, "-m", "pip", "install", *options, f"{wheel}[service,trainer]", cwd=tmp_path)
    assert "verify" in call(binaries / "emaswap", "--help", cwd=tmp_path)
    for command in (("-m", "trainer"), ("-m", "service")):
        assert "--store" in call(python, *command, "--help", cwd=tmp_path)
    call(python, "-m", "trainer", "--store", "store", "--steps", "40", "--publish-every", "20", cwd=tmp_path)
    service = subprocess.Popen(
        [python, "-m", "service", "--store", "store", "--port", "0", "--log-format", "json"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(service.stdout.readline, "")))  # type: ignore[union-attr]
    reader.start()
    try:
        said = wait_for(lambda: [line for line in lines if '"listening"' in line], timeout_s=60, what="listening")[0]
        served = Served(f"http://127.0.0.1:{json.loads(said)['port']}")
        with served.client:
            wait_for(lambda: served.client.get("/readyz").status_code == 200, what="ready")
            answer = served.predict([[[[0.5] * 8] * 8]]).json()
        assert answer["model"]["version"] == 2
        assert answer["predictions"][0]["label"] in "0123456789"
    finally:
        service.terminate()
        status = service.wait(60)
        reader.join()
        assert service.stdout is not None
        service.stdout.close()
    assert status == 0, lines
