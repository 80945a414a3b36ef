"""CPU cores and memory that a process may use, and how several ranks on a machine divide them.

srun binds each rank to its own cores; under torchrun every rank may run on all cores of the machine. Containers and
schedulers set further limits. The ranks therefore exchange their `Resources` and divide what they share.

Importing this module records the CPUs of this process. It changes nothing.
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
    """Return the CPUs that this process may run on; all CPUs on systems without CPU affinity, such as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


# If one of these is set, importing torch makes OpenMP bind the main thread to a single core, and processes started
# later inherit that. So read the affinity when mgvideo is imported, before torch.
_OPENMP_BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_CPUS_AT_START = _affinity()


def available_cpus() -> frozenset[int]:
    """Return the CPUs that this process may run on, even if OpenMP has bound its main thread to one of them."""
    return _CPUS_AT_START if any(name in os.environ for name in _OPENMP_BINDING_VARIABLES) else _affinity()


def set_cpu_affinity(cpus: frozenset[int]) -> None:
    """Set the CPU affinity of this thread, and of threads and processes it starts later, where the system allows it."""
    if _affinity() != cpus and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)


@dataclass(frozen=True)
class Resources:
    """What one process may use of its machine. Processes with the same key in their limits share that limit."""

    machine: str  # the same for all processes on a machine, also in different containers
    cpus: frozenset[int]  # CPUs that the process may run on
    cpu_limits: Mapping[str, Fraction]  # cores
    memory: int  # available bytes of the machine
    memory_limits: Mapping[str, int]  # bytes left under each limit


def machine_id() -> str:
    """Return an identifier of this machine: the same in all of its containers, new at each boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else platform.node()


def find_resources() -> Resources:
    """Return the current resources of this process."""
    return Resources(
        machine=machine_id(),
        cpus=available_cpus(),
        cpu_limits=cgroups.cpu_limits() | _slurm_limits(os.environ),
        memory=psutil.virtual_memory().available,
        memory_limits=cgroups.memory_limits(),
    )


def cpu_share(own: Resources, ranks: Sequence[Resources]) -> Fraction:
    """Return the number of CPU cores for the rank with `own` resources; `ranks` holds the resources of all ranks.

    Ranks divide each core that they may run on equally, and likewise each limit that they share.
    """
    same_machine = [rank for rank in ranks if rank.machine == own.machine]
    users = Counter(cpu for rank in same_machine for cpu in rank.cpus)
    cores = sum((Fraction(1, users[cpu]) for cpu in own.cpus), Fraction(0))
    return min([cores, *_shares(own.cpu_limits, [rank.cpu_limits for rank in same_machine])])


def memory_share(own: Resources, ranks: Sequence[Resources]) -> int:
    """Return the bytes of memory for the rank with `own` resources: ranks get equal parts of the free memory.

    `ranks` holds the resources of all ranks.
    """
    same_machine = [rank for rank in ranks if rank.machine == own.machine]
    free = Fraction(own.memory, len(same_machine))
    return int(min([free, *_shares(own.memory_limits, [rank.memory_limits for rank in same_machine])]))


def cpu_count() -> int:
    """Return the number of CPU cores for a program of a single process, at least 1."""
    own = find_resources()
    return max(1, int(cpu_share(own, [own])))


def _shares(own: Mapping[str, int | Fraction], limits: Sequence[Mapping[str, int | Fraction]]) -> Iterator[Fraction]:
    """Divide each of a rank's `own` limits by the number of ranks under it; `limits` holds those of all ranks."""
    for key, limit in own.items():
        yield Fraction(limit) / sum(key in rank_limits for rank_limits in limits)


def _slurm_limits(environment: Mapping[str, str]) -> dict[str, Fraction]:
    """Return the numbers of cores that SLURM allocated, by an identifier of the task or the step's node.

    They matter where SLURM does not bind tasks to cores, so that a process may run on all cores of the node. The
    cores per task apply only within a step started by srun. A batch script also has that variable, but its processes,
    such as the ranks of torchrun, share all of the job's cores on the node.
    """
    step = f"SLURM {environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    cores = {f"{step} node {environment.get('SLURM_NODEID')}": environment.get("SLURM_CPUS_ON_NODE", "")}
    if "SLURM_STEP_ID" in environment:
        cores[f"{step} task {environment.get('SLURM_PROCID')}"] = environment.get("SLURM_CPUS_PER_TASK", "")
    return {key: Fraction(text) for key, text in cores.items() if text.isdecimal() and int(text) > 0}
