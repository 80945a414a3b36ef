"""CPU and memory limits of this process's cgroups, which containers and SLURM set and the kernel enforces.

Both cgroup versions count, and so do mixed mounts. A limit of an outer cgroup holds for all processes inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

Limit = TypeVar("Limit")


def cpu_limits(root: Path = Path("/")) -> dict[str, Fraction]:
    """CPU quotas in cores, by an identifier of their cgroup. `root` is the folder that holds `proc` and the mounts."""
    return _limits("cpu", _cpu_quota, root)


def memory_limits(root: Path = Path("/")) -> dict[str, int]:
    """Bytes that each limited cgroup may still take, cached files counted as free, by an identifier of the cgroup."""
    return _limits("memory", _memory_left, root)


def _limits(controller: str, read: Callable[[Path], Limit | None], root: Path) -> dict[str, Limit]:
    limits = {}
    with suppress(OSError, ValueError):  # no cgroups: another system than Linux, or /proc is not mounted
        for folder in _folders(controller, root):
            with suppress(OSError, ValueError):  # a folder without this controller's files
                limit, about = read(folder), folder.stat()
                if limit is not None:  # namespaces show one cgroup under several paths, but under one inode
                    limits[f"cgroup {about.st_dev}:{about.st_ino}"] = limit
    return limits


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the cgroups around this process, from its own outwards, as far as they are mounted here."""
    paths: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)  # version 2 names no controllers
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mounted, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            name = ""
        elif kind == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name in paths:
            yield from _upwards(root / point.lstrip("/"), _inside(mounted, paths[name]))


def _inside(mounted: str, path: str) -> str:
    """Where a cgroup lies below a mount point that shows the cgroup `mounted`; "" where that is not to be seen."""
    prefix = mounted.rstrip("/") + "/"
    hidden = ".." in path or not f"{path}/".startswith(prefix)
    return "" if hidden else path[len(prefix) :].strip("/")


def _upwards(mount: Path, inside: str) -> Iterator[Path]:
    folder = mount / inside
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _cpu_quota(folder: Path) -> Fraction | None:
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
        )
    return None if quota in ("max", "-1") else Fraction(int(quota), int(period))


def _memory_left(folder: Path) -> int | None:
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
