"""Where torch computes, and on how many processors."""

import math
import os
from pathlib import Path, PurePosixPath

import torch

from emaswap.errors import EmaswapError


def pick_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means. Raises `EmaswapError` when it is CUDA and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EmaswapError("--device cuda: torch sees no CUDA device here; use --device auto or cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may keep busy: those it may run on, or what its control groups allow.

    Args:
        root: where /proc and /sys are found.
    """
    allowed = [float(len(os.sched_getaffinity(0)))]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        # In a container its own group is what is mounted, and the path that the host has for it leads nowhere.
        for part in [*PurePosixPath(path).parents, PurePosixPath(path)]:
            folder = mount / str(part).lstrip("/")
            if controllers:
                quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
            else:
                quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                allowed.append(int(quota) / int(period))
    return max(1, math.ceil(min(allowed)))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
