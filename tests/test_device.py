"""How many processors there are, by affinity and by control groups of both versions."""

import os
from pathlib import Path

import pytest

from emaswap.device import processors

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, HERE, id="no groups"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, HERE, id="no limit"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1, id="half of one"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1, id="of a parent"),
        pytest.param({"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "90000 100000\n"}, 1, id="container"),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n3:memory:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            1,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            HERE,
            id="version 1, no limit",
        ),
    ],
)  # fmt: skip
def test_processors(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The least that affinity and the groups allow, and never none."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert processors(tmp_path) == min(expected, HERE)
