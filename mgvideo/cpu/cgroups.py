"""Read the CPU and memory limits of this process's cgroups, which containers and SLURM set and the kernel enforces.

Handles cgroup versions 1 and 2, also where both are mounted. A limit of an outer cgroup applies to all processes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

Limit = TypeVar("Limit")


def cpu_limits(root: Path = Path("/")) -> dict[str, Fraction]:
    """Return the CPU quotas in cores, by an identifier of their cgroup.

    `root` is the folder that holds `proc` and the mount points; tests replace it.
    """
    return _limits("cpu", _cpu_quota, root)


def memory_limits(root: Path = Path("/")) -> dict[str, int]:
    """Return the bytes that each limited cgroup may still allocate, by an identifier of the cgroup.

    The page cache counts as free. `root` as in `cpu_limits`.
    """
    return _limits("memory", _memory_left, root)


def _limits(controller: str, read: Callable[[Path], Limit | None], root: Path) -> dict[str, Limit]:
    limits = {}
    with suppress(OSError, ValueError):  # no cgroups: the system is not Linux, or /proc is not mounted
        for folder in _cgroup_folders(controller, root):
            with suppress(OSError, ValueError):  # the folder lacks this controller's files
                limit, status = read(folder), folder.stat()
                if limit is not None:  # the inode identifies a cgroup that namespaces show under several paths
                    limits[f"cgroup {status.st_dev}:{status.st_ino}"] = limit
    return limits


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of the cgroups around it, innermost first, where mounted."""
    paths: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)  # version 2 names no controllers
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mount_fields, _, filesystem_fields = line.partition(" - ")
        mounted_cgroup, mount_point = mount_fields.split()[3:5]
        filesystem, _, options = filesystem_fields.split()[:3]
        if filesystem == "cgroup2":
            name = ""
        elif filesystem == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name in paths:
            yield from _folder_and_parents(root / mount_point.lstrip("/"), _relative_path(mounted_cgroup, paths[name]))


def _relative_path(mounted_cgroup: str, path: str) -> str:
    """Return the path of a cgroup relative to a mount point that shows `mounted_cgroup`; "" if it is not visible there.

    A container sees only its part of the tree, so the mount point itself then holds the limits.
    """
    prefix = mounted_cgroup.rstrip("/") + "/"
    hidden = ".." in path or not f"{path}/".startswith(prefix)
    return "" if hidden else path[len(prefix) :].strip("/")


def _folder_and_parents(mount: Path, relative_path: str) -> Iterator[Path]:
    folder = mount / relative_path
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _cpu_quota(folder: Path) -> Fraction | None:
    """Return a cgroup's CPU quota in cores, None if it has none."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
        )
    return None if quota in ("max", "-1") else Fraction(int(quota), int(period))


def _memory_left(folder: Path) -> int | None:
    """Return the bytes that a cgroup may still allocate, None if it is unlimited."""
    if (folder / "memory.current").exists():
        limits, usage, prefix = ["memory.max", "memory.high"], "memory.current", ""
    else:
        limits, usage, prefix = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
    values = [text for name in limits if (text := (folder / name).read_text(encoding="utf-8").strip()) != "max"]
    if not values:
        return None
    counters = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    cached = sum(int(counters.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, min(map(int, values)) - int((folder / usage).read_text(encoding="utf-8")) + cached)
