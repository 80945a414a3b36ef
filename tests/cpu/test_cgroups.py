"""Limits of cgroups: from copies of the kernel's files, and from a cgroup created for the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import pytest

from mgvideo.cpu.cgroups import cpu_limits, memory_limits

V2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 {mounted} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 23 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 23 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


def write_system(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """Write copies of the kernel's files under `root`: /proc/self/cgroup, mountinfo, and `files` of /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" + mounts)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def memory_files_v2(folder: str, limit: str, used: int, high: str = "max") -> dict[str, str]:
    counters = "anon 10\nfile 70\ninactive_file 40\nactive_file 30\n"
    values = {"max": limit, "high": high, "current": str(used), "stat": counters}
    return {f"{folder}memory.{name}": text for name, text in values.items()}


def test_version_2_limits_of_the_own_and_all_outer_cgroups_count(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "",  # the root has no cpu.max
        "pod/cpu.max": "800000 100000\n",
        "pod/box/cpu.max": "max 100000\n",
        "pod/box/deep/cpu.max": "150000 100000\n",
        "other/cpu.max": "100000 100000\n",
        **memory_files_v2("pod/", "1000\n", 300),
        **memory_files_v2("pod/box/", "max\n", 200, high="500\n"),
        **memory_files_v2("pod/box/deep/", "max\n", 200),
    }
    root = write_system(tmp_path, "0::/pod/box/deep\n", V2.format(mounted="/"), files)
    assert sorted(cpu_limits(root).values()) == [Fraction(3, 2), 8]
    assert sorted(memory_limits(root).values()) == [500 - 200 + 70, 1000 - 300 + 70]


@pytest.mark.parametrize(
    ("cgroup", "mounted"),
    [
        ("/", "/"),  # the container has its own cgroup namespace
        ("/docker/4f1c", "/docker/4f1c"),  # no namespace: the path on the host, of which only this part is mounted
        ("/docker/4f1c", "/"),  # no namespace, and the mount table does not name the mounted part
        ("/../../kubepods", "/"),  # outside the root of the namespace
    ],
)
def test_a_container_reads_the_limits_at_its_mount_point(tmp_path: Path, cgroup: str, mounted: str) -> None:
    files = {"cpu.max": "250000 100000", **memory_files_v2("", "900", 100)}
    root = write_system(tmp_path, f"0::{cgroup}\n", V2.format(mounted=mounted), files)
    assert list(cpu_limits(root).values()) == [Fraction(5, 2)]
    assert list(memory_limits(root).values()) == [870]


def test_version_1_limits_count_if_version_2_is_mounted_without_controllers(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n",
        "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": "2000\n",
        "memory/memory.usage_in_bytes": "1500\n",
        "memory/memory.stat": "cache 1\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 100\n",
        "unified/cgroup.procs": "",
    }
    cgroup = "5:memory:/\n4:cpu,cpuacct:/job/step\n0::/\n"
    root = write_system(tmp_path, cgroup, V1.format(mounted="/"), files)
    assert list(cpu_limits(root).values()) == [4]
    assert list(memory_limits(root).values()) == [2000 - 1500 + 400]


def test_a_cgroup_over_its_limit_has_no_memory_left(tmp_path: Path) -> None:
    root = write_system(tmp_path, "0::/\n", V2.format(mounted="/"), memory_files_v2("", "100", 500))
    assert list(memory_limits(root).values()) == [0]


def test_systems_without_cgroups_have_no_limits(tmp_path: Path) -> None:
    assert cpu_limits(tmp_path) == memory_limits(tmp_path) == {}


@pytest.fixture
def quota_of_half_a_core() -> Iterator[Path]:
    """Create a cgroup with a quota of half a core on this machine, of either version, and yield its folder."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    parent, file, text = (
        (v1, "cpu.cfs_quota_us", "50000") if (v1 / "cpu.cfs_quota_us").exists() else (v2, "cpu.max", "50000 100000")
    )
    folder = parent / f"mgvideo_test_{uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot create a cgroup here: {error.strerror}")
    try:
        (folder / file).write_text(text)
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"cannot set a quota here: {error.strerror}")
    yield folder
    folder.rmdir()


def test_a_process_reads_the_quota_of_a_real_cgroup(quota_of_half_a_core: Path) -> None:
    join = f"import os; open({str(quota_of_half_a_core / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
    print_limits = "from mgvideo.cpu.cgroups import cpu_limits; print(*cpu_limits().values())"
    done = subprocess.run([sys.executable, "-c", f"{join}; {print_limits}"], capture_output=True, text=True, timeout=60)
    assert "1/2" in done.stdout.split(), done.stdout + done.stderr
