"""What a process may use of its machine, CPU cores and memory, and how much of that each of several ranks gets.

A rank may be bound to cores of its own, as srun does, or run on all cores of the machine, as under torchrun; containers
and schedulers limit it further. So the ranks compare what each of them may use.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil

from . import cgroups


def _affinity() -> frozenset[int]:
    """CPUs that this process may run on; all CPUs on systems that do not tell, such as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


# Where one of these is set, OpenMP binds the main thread to a single core when torch is imported, and processes started
# later inherit that. So the CPUs are read before, when mgvideo is imported.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_CPUS_AT_START = _affinity()


def available_cpus() -> frozenset[int]:
    """CPUs that this process may run on, also where OpenMP has bound its main thread to one of them."""
    return _CPUS_AT_START if any(name in os.environ for name in _BINDING) else _affinity()


def run_on(cpus: frozenset[int]) -> None:
    """Let this thread, and what is started from it, run on `cpus`, where the system can be told."""
    if _affinity() != cpus:
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)


@dataclass(frozen=True)
class Resources:
    """What one process may use of its machine. Processes share a limit that they name by the same key."""

    machine: str  # the same for all processes of one machine, in other containers too
    cpus: frozenset[int]  # CPUs that the process may run on
    cpu_limits: Mapping[str, Fraction]  # cores
    memory: int  # bytes that the machine has available
    memory_limits: Mapping[str, int]  # bytes that are left


def machine_id() -> str:
    """An identifier of this machine, the same in all of its containers, from its last start on."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else platform.node()


def find_resources() -> Resources:
    """The resources of this process, as they are now."""
    return Resources(
        machine=machine_id(),
        cpus=available_cpus(),
        cpu_limits=cgroups.cpu_limits() | _slurm_limits(os.environ),
        memory=psutil.virtual_memory().available,
        memory_limits=cgroups.memory_limits(),
    )


def cpu_share(own: Resources, ranks: Sequence[Resources]) -> Fraction:
    """CPU cores for the rank with `own` resources, one of `ranks`.

    Ranks that may run on a core share it equally, and so do the ranks under a limit. Cores that only one rank may run
    on are its own.
    """
    neighbours = [rank for rank in ranks if rank.machine == own.machine]
    users = Counter(cpu for rank in neighbours for cpu in rank.cpus)
    cores = sum((Fraction(1, users[cpu]) for cpu in own.cpus), Fraction(0))
    return min([cores, *_shares(own.cpu_limits, [rank.cpu_limits for rank in neighbours])])


def memory_share(own: Resources, ranks: Sequence[Resources]) -> int:
    """Bytes of memory for the rank with `own` resources, one of `ranks`: equal shares of what is free."""
    neighbours = [rank for rank in ranks if rank.machine == own.machine]
    free = Fraction(own.memory, len(neighbours))
    return int(min([free, *_shares(own.memory_limits, [rank.memory_limits for rank in neighbours])]))


def cpu_count() -> int:
    """CPU cores for a program of one process, 1 or more."""
    own = find_resources()
    return max(1, int(cpu_share(own, [own])))


def _shares(own: Mapping[str, int | Fraction], limits: Sequence[Mapping[str, int | Fraction]]) -> Iterator[Fraction]:
    for key, limit in own.items():
        yield Fraction(limit) / sum(key in others for others in limits)


def _slurm_limits(environment: Mapping[str, str]) -> dict[str, Fraction]:
    """Cores that SLURM allocated: where it does not bind tasks to them, a process may run on the others too.

    A task's number of cores holds in a step of srun alone. A batch script has its variable too, but all of the job's
    cores on the node, which the ranks of a torchrun in it share.
    """
    step = f"SLURM {environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    cores = {f"{step} node {environment.get('SLURM_NODEID')}": environment.get("SLURM_CPUS_ON_NODE", "")}
    if "SLURM_STEP_ID" in environment:
        cores[f"{step} task {environment.get('SLURM_PROCID')}"] = environment.get("SLURM_CPUS_PER_TASK", "")
    return {key: Fraction(text) for key, text in cores.items() if text.isdecimal() and int(text) > 0}
