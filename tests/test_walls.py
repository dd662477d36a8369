"""The walls of the house: which room may import which. The rule is checked on the code, and on trees that break it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import ROOT

PACKAGES = ("emaswap", "trainer", "service")
WEB = {"fastapi", "starlette", "uvicorn"}
GROUND = {"tensors", "errors", "release", "device", "priority", "settings"}
LIBRARY = {"averaging", "files", "versions", "store", "publishing", "integrations", "models", "cli", "client"}
SERVICE = {"control", "serving", "web", "workers", "parts"}


def _rooms(package: str, names: set[str]) -> set[str]:
    return {f"{package}.{name}" for name in names}


def _below(*allowed: str) -> set[str]:
    """The rooms of the library that a room may not import when these are below it."""
    return _rooms("emaswap", LIBRARY - set(allowed)) | {"trainer", "service"}


# A room, and what nothing in it may import: packages, rooms, or modules.
WALLS: dict[str, set[str]] = {
    "emaswap": {"trainer", "service", "sklearn", "prometheus_client", "structlog", "watchfiles", "orjson", *WEB},
    "trainer": {"service", "prometheus_client", "structlog", "watchfiles", "orjson", *WEB},
    "service": {"trainer", "sklearn"},
    **{f"emaswap.{name}": _below() for name in sorted(GROUND)},
    "emaswap.averaging": _below("averaging"),
    "emaswap.files": _below("files"),
    "emaswap.versions": _below("averaging", "files", "versions"),
    "emaswap.store": _below("averaging", "files", "versions", "store"),
    "emaswap.publishing": _below("averaging", "files", "versions", "store", "publishing"),
    "emaswap.models": _below("models"),
    "service.serving": {*_rooms("service", SERVICE - {"serving"}), "emaswap.store", "emaswap.publishing", *WEB},
    "service.control": {*_rooms("service", {"web", "workers", "parts"}), "emaswap.publishing", *WEB},
    "service.workers": {"service.web", *WEB},
    "service.parts": {"service.web", *WEB},
    "service.refusal": {*_rooms("service", SERVICE), *WEB},
}


def _is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    """Every module or name that a file imports, wherever in it, by its full path."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _code(root: Path) -> Iterator[tuple[str, set[str]]]:
    """Each module below a root, and what it imports."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield _name(path, root), set(_imports(path))


def crossings(root: Path, room: str) -> list[str]:
    """Who in a room imports what lies behind its wall."""
    return [
        f"{module} imports {imported}"
        for module, imports in _code(root)
        if _is_in(module, room)
        for imported in sorted(imports)
        if any(_is_in(imported, forbidden) for forbidden in WALLS[room])
    ]


def strangers_to_the_web(root: Path) -> list[str]:
    """Who imports a web framework without being the web's room or a program's beginning."""
    return [
        f"{module} imports {imported}"
        for module, imports in _code(root)
        if not _is_in(module, "service.web") and module != "service.__main__"
        for imported in sorted(imports)
        if imported.partition(".")[0] in WEB
    ]


def strangers_to_the_keys(root: Path) -> list[str]:
    """Who outside of the store imports the names of its files, or reads and writes files past it."""
    return [
        f"{module} imports {imported}"
        for module, imports in _code(root)
        if not _is_in(module, "emaswap.store")
        for imported in sorted(imports)
        if any(_is_in(imported, f"emaswap.store.{name}") for name in ("keys", "files"))
    ]


def circles(root: Path) -> list[tuple[str, ...]]:
    """Modules that import each other, directly or by way of others."""
    code = dict(_code(root))
    # `from a.b import c` names the module a.b.c, or a name in the module a.b.
    edges = {
        module: {
            name
            for imported in imports
            for name in [imported if imported in code else imported.rpartition(".")[0]]
            if name in code and name != module
        }
        for module, imports in code.items()
    }
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen: set[str] = set()
        left = [module]
        while left:
            for following in edges[left.pop()] - seen:
                seen.add(following)
                left.append(following)
        reached[module] = seen
    rings = (tuple(sorted(other for other in reached[module] if module in reached[other])) for module in edges)
    return sorted({ring for ring in rings if ring})


@pytest.mark.parametrize("room", WALLS)
def test_a_wall_stands(room: str) -> None:
    """Nothing in a room imports what lies behind its wall."""
    assert crossings(ROOT, room) == []


def test_only_the_web_knows_the_web() -> None:
    """FastAPI, Starlette and uvicorn are imported by service/web and by the program that starts the server."""
    assert strangers_to_the_web(ROOT) == []


def test_only_the_store_knows_its_keys() -> None:
    """What a store's files are called is known in emaswap/store alone."""
    assert strangers_to_the_keys(ROOT) == []


def test_no_module_imports_itself_by_way_of_another() -> None:
    """Imports have no circles."""
    assert circles(ROOT) == []


def test_the_library_has_few_rooms() -> None:
    """What stands at the top of the library can be taken in at a look."""
    top = [path.name for path in (ROOT / "emaswap").iterdir() if path.name != "__pycache__"]
    assert len(top) <= 18, sorted(top)


@pytest.mark.parametrize("room", WALLS)
@pytest.mark.parametrize("style", ["import {}", "from {} import thing", "def f():\n    from {} import thing"])
def test_a_crossing_is_seen(room: str, style: str, tmp_path: Path) -> None:
    """Whatever is behind a wall, whichever way it is imported and however deep in the room, it is found."""
    folder = tmp_path.joinpath(*room.split(".")) / "deep"
    folder.mkdir(parents=True)
    for forbidden in WALLS[room]:
        (folder / "culprit.py").write_text(style.format(forbidden) + "\n")
        assert len(crossings(tmp_path, room)) == 1, forbidden


@pytest.mark.parametrize("framework", sorted(WEB))
def test_a_stranger_to_the_web_is_seen(framework: str, tmp_path: Path) -> None:
    """A web framework imported by a worker, by the library or by the service's parts is found."""
    for name in ("service/workers/worker.py", "service/parts.py", "emaswap/client.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from {framework}.deep import thing\n")
    assert len(strangers_to_the_web(tmp_path)) == 3


@pytest.mark.parametrize(
    "style", ["import emaswap.store.{}", "from emaswap.store import {}", "from emaswap.store.{} import x"]
)
@pytest.mark.parametrize("name", ["keys", "files"])
def test_a_stranger_to_the_keys_is_seen(name: str, style: str, tmp_path: Path) -> None:
    """A service, a publisher or a command that imports the names of a store's files is found; the store is not."""
    for path in ("service/control/watcher.py", "emaswap/publishing/publisher.py", "emaswap/cli/looking.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(style.format(name) + "\n")
    (tmp_path / "emaswap" / "store").mkdir()
    (tmp_path / "emaswap" / "store" / "line.py").write_text(style.format(name) + "\n")
    assert len(strangers_to_the_keys(tmp_path)) == 3


def test_a_circle_is_seen(tmp_path: Path) -> None:
    """Three modules in a ring are found, whether they import modules or names."""
    folder = tmp_path / "emaswap" / "store"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from emaswap.store import b\n")
    (folder / "b.py").write_text("from emaswap.store.c import thing\n")
    (folder / "c.py").write_text("import emaswap.store.a\n")
    assert circles(tmp_path) == [("emaswap.store.a", "emaswap.store.b", "emaswap.store.c")]
