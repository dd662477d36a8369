"""How much memory a process may use, from what the system says in its files."""

import resource
from pathlib import Path

import pytest

from emaswap import Short
from emaswap.files.memory import available_bytes, require
from tests.programs import run

MIB = 1 << 20
MEMINFO = "MemTotal:       2097152 kB\nMemFree: 5 kB\nMemAvailable:    1048576 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    """A system's files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group_2(path: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """The files of a control group of version 2."""
    folder = f"sys/fs/cgroup{path}"
    statistics = f"anon 5\nfile 7\ninactive_file {cached}\nactive_file 0\nsock 0\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": statistics,
    }


def group_1(path: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    """The files of a memory group of version 1."""
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 9\ninactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n",
    }


V2, V1 = "0::{}\n", "5:cpu:/\n4:memory:{}\n0::/\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, None, id="nothing is told"),
        pytest.param({"proc/meminfo": MEMINFO}, 1024 * MIB, id="the machine alone"),
        pytest.param(
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": V2.format("/a"), **group_2("/a", str(500 * MIB), 200 * MIB)},
            300 * MIB,
            id="a group",
        ),
        pytest.param(
            {"proc/self/cgroup": V2.format("/a"), **group_2("/a", str(500 * MIB), 200 * MIB, cached=150 * MIB)},
            450 * MIB,
            id="its cache can be taken back",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V2.format("/a/b"),
                **group_2("/a", str(500 * MIB), 450 * MIB),
                **group_2("/a/b", str(400 * MIB), 100 * MIB),
            },
            50 * MIB,
            id="a group around it is fuller",
        ),
        pytest.param(
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": V2.format("/a"), **group_2("/a", "max", 200 * MIB)},
            1024 * MIB,
            id="a group without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": V2.format("/docker/1f"), **group_2("", str(500 * MIB), 100 * MIB)},
            400 * MIB,
            id="a container whose group is the root",
        ),
        pytest.param(
            {"proc/self/cgroup": V2.format("/a"), **group_2("/a", str(500 * MIB), 600 * MIB)}, 0, id="more than all"
        ),
        pytest.param(
            {"proc/self/cgroup": V1.format("/a"), **group_1("/a", 500 * MIB, 200 * MIB, cached=20 * MIB)},
            320 * MIB,
            id="a group of version 1",
        ),
        pytest.param(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": V1.format("/a"),
                **group_1("", 0x7FFFFFFFFFFFF000, 5),
                **group_1("/a", 0x7FFFFFFFFFFFF000, 5),
            },
            1024 * MIB,
            id="version 1 without a limit",
        ),
        pytest.param(
            {
                "proc/meminfo": "MemAvailable: \nrubbish",
                "proc/self/cgroup": V2.format("/a"),
                "sys/fs/cgroup/a/memory.max": "?",
            },
            None,
            id="nothing that can be understood",
        ),
    ],
)
def test_the_least_of_all_limits_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    """Machine, control groups of either version, nested and as a container sees them."""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert available_bytes(write(tmp_path, files)) == expected


def test_what_is_asked_of_this_machine_is_granted_or_refused() -> None:
    """A byte is to be had, and a petabyte is not."""
    require(1, "nothing")
    with pytest.raises(Short, match=r"the model takes 1048576\.0 GiB of memory, and .* are available"):
        require(1 << 50, "the model")


def test_a_limit_of_address_space_counts() -> None:
    """As `ulimit -v` sets it."""
    code = (
        "import resource\nfrom emaswap.files.memory import available_bytes\nfrom pathlib import Path\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))\n"
        "print(available_bytes() >> 20)"
    )
    assert 32 <= int(run("-c", code, check=True).stdout) <= 64
