"""The house rules of the code: what is public, and what nobody may use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import emaswap
from tests.serving import ROOT

WEB = {"fastapi", "starlette", "uvicorn", "prometheus_client", "structlog", "watchfiles", "orjson"}
PACKAGES = ("emaswap", "trainer", "service")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def test_no_pickle_anywhere() -> None:
    """Nothing of ours reads or writes a pickle, by whatever name."""
    ours = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    wrong = [
        str(path.relative_to(ROOT))
        for path in ours
        if {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
        & {name.partition(".")[0] for name in _imports(path)}
        or "torch.load(" in path.read_text()
        or "torch.save(" in path.read_text()
    ]
    assert wrong == []


def test_all_is_exact() -> None:
    """`__all__` has every public name of the package, and nothing else."""
    public = {
        name for name, value in vars(emaswap).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(emaswap.__all__) == public | {"__version__"}


def test_importing_the_library_imports_no_web_framework() -> None:
    """`import emaswap` in somebody else's training loop brings torch and little else."""
    assert sorted((WEB | {"sklearn"}) & _imported_with_emaswap()) == []


def test_every_module_says_what_it_is_for() -> None:
    """Each module has a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_each_framework_is_imported_by_its_own_integration_alone() -> None:
    """`import emaswap` needs none of the training frameworks, and no integration needs that of another."""
    frameworks = {"lightning": "lightning", "transformers": "huggingface", "accelerate": "", "ultralytics": ""}
    found = {
        (name.partition(".")[0], path.relative_to(ROOT).as_posix())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in _imports(path)
        if name.partition(".")[0] in frameworks
    }
    assert found == {(name, f"emaswap/integrations/{own}.py") for name, own in frameworks.items() if own}
    assert "emaswap.integrations" not in _imported_with_emaswap()


@cache
def _imported_with_emaswap() -> set[str]:
    command = [sys.executable, "-c", "import sys, emaswap; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
