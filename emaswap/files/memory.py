"""How much memory this process may still use: what its control groups, its own limit and the machine leave."""

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from emaswap.errors import Short

_ROOT = Path("/")
# Limits of a control group that mean that there is none.
_UNLIMITED = 1 << 60


def require(count: int, what: str) -> None:
    """Raise `Short` when so many bytes are not to be had just now. Where that cannot be told, nothing is raised."""
    available = available_bytes()
    if available is not None and count > available:
        raise Short(f"{what} takes {_in_words(count)} of memory, and {_in_words(available)} are available")


def give_back() -> None:
    """Give memory that is free in this process back to the system, where the C library can do that (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return how many bytes this process may still use, `None` where the system does not say.

    That is the least of what the machine, each control group that the process is in (version 1 or 2) and its own limit of
    address space leave. What a group uses for the cache of files can be taken back, and counts as available.

    Args:
        root: where /proc and /sys are found.
    """
    found = [*_of_machine(root), *_of_groups(root), *_of_process(root)]
    return max(min(found), 0) if found else None


def _of_machine(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1]:
            yield int(value.split()[0]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cached = (
                "sys/fs/cgroup",
                "memory.max",
                "memory.current",
                ("inactive_file", "active_file"),
            )
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = ("total_inactive_file", "total_active_file")
        else:
            continue
        # In a container its own group is what is mounted, and the path that the host has for it leads nowhere.
        for part in [*PurePosixPath(path).parents, PurePosixPath(path)]:
            folder = root / mount / str(part).lstrip("/")
            at_most, used = _number(folder / limit), _number(folder / usage)
            if at_most is None or used is None or at_most >= _UNLIMITED:
                continue
            statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
            yield at_most - used + sum(int(statistics.get(name, 0)) for name in cached)


def _of_process(root: Path) -> Iterator[int]:
    at_most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if at_most != resource.RLIM_INFINITY and (pages := _text(root / "proc/self/statm").split()[:1]):
        yield at_most - int(pages[0]) * resource.getpagesize()


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _in_words(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
