"""How ranks divide the cores and the memory of their machine."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from mgvideo.cpu import resources
from mgvideo.cpu.resources import Resources, available_cpus, cpu_count, cpu_share, find_resources, memory_share
from mgvideo.distributed.process_group import limit_threads


def rank(cpus: range, machine: str = "a", memory: int = 1000, **limits: dict[str, int]) -> Resources:
    """Return the resources of a rank; `limits` are `cpu`, in cores, and `memory_left`, in bytes."""
    cpu_limits = {key: Fraction(limit) for key, limit in limits.get("cpu", {}).items()}
    return Resources(machine, frozenset(cpus), cpu_limits, memory, limits.get("memory_left", {}))


def cores_of(*ranks: Resources) -> list[Fraction]:
    return [cpu_share(own, ranks) for own in ranks]


def test_ranks_of_torchrun_divide_the_cores_of_the_machine() -> None:
    assert cores_of(*[rank(range(64))] * 8) == [8] * 8


def test_ranks_that_srun_binds_keep_their_cores() -> None:
    assert cores_of(*(rank(range(8 * i, 8 * i + 8)) for i in range(8))) == [8] * 8


def test_ranks_divide_only_the_cores_that_several_may_run_on() -> None:
    assert cores_of(rank(range(8)), rank(range(2)), rank(range(4, 12))) == [1 + 2 + 2, 1, 2 + 4]


def test_ranks_on_different_machines_do_not_share_cores() -> None:
    assert cores_of(rank(range(4), "a"), rank(range(4), "b"), rank(range(4), "b")) == [4, 2, 2]


def test_ranks_of_a_container_share_its_quota() -> None:
    in_container = rank(range(64), cpu={"container": 6})
    assert cores_of(*[in_container] * 4) == [Fraction(3, 2)] * 4


def test_each_container_has_its_own_quota() -> None:
    assert cores_of(rank(range(64), cpu={"one": 6}), rank(range(64), cpu={"other": 4})) == [6, 4]


def test_the_tightest_limit_counts() -> None:
    limits = {"step": 32, "task": 4}
    assert cores_of(rank(range(64), cpu=limits), rank(range(64), cpu={"step": 32, "task 1": 40})) == [4, 16]


def test_ranks_divide_free_memory_and_the_memory_left_under_a_limit() -> None:
    ranks = [
        rank(range(2), memory_left={"a": 600, "b": 100}),
        rank(range(2), memory_left={"a": 600}),
        rank(range(2), "other"),
    ]
    assert [memory_share(own, ranks) for own in ranks] == [100, 300, 1000]


def cores_in_slurm(monkeypatch: pytest.MonkeyPatch, **variables: int) -> Fraction:
    """Return the cores of one of two processes that share SLURM's environment `variables` and 64 CPUs."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(resources, "available_cpus", lambda: frozenset(range(64)))
    own = find_resources()
    return cpu_share(own, [own, own])


STEP = {"JOB_ID": 7, "STEP_ID": 0, "PROCID": 0, "NODEID": 0}  # variables of a step that srun starts


def test_tasks_that_srun_does_not_bind_use_the_cores_allocated_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # two processes of one task, as when srun starts torchrun
    assert cores_in_slurm(monkeypatch, **STEP, CPUS_PER_TASK=8, CPUS_ON_NODE=32) == 4
    assert cores_in_slurm(monkeypatch, **STEP, CPUS_ON_NODE=32) == 16
    assert cores_in_slurm(monkeypatch, **STEP) == 32


def test_torchrun_in_a_batch_script_uses_the_cores_of_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores_in_slurm(monkeypatch, JOB_ID=7, PROCID=0, NODEID=0, CPUS_PER_TASK=8, CPUS_ON_NODE=48) == 24


def test_a_program_gets_at_least_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.cgroups, "cpu_limits", lambda: {"small": Fraction(1, 2)})
    assert cpu_count() == 1


def test_without_cpu_affinity_all_cores_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cpus() == {0, 1, 2}
    resources.set_cpu_affinity(frozenset({0, 1, 2}))


@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", "GOMP_CPU_AFFINITY=0"])
def test_the_binding_of_openmp_changes_neither_the_cores_counted_nor_those_of_workers(variable: str) -> None:
    """Importing torch makes OpenMP bind the main thread to one core, and processes started later inherit that."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    name, value = variable.split("=")
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CORES],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[:2] == [str(len(cores)), str(sorted(cores))], done.stdout + done.stderr


PRINT_CORES = """
import os
from mgvideo.cpu.resources import available_cpus, find_resources
import torch
from mgvideo.loading import workers

print(len(find_resources().cpus))
workers.init_worker(False, available_cpus(), 0)
print(sorted(os.sched_getaffinity(0)))
"""


def test_torch_uses_at_most_as_many_threads_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        limit_threads(2)
        assert torch.get_num_threads() == 4, "the user sets OMP_NUM_THREADS"
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads(Fraction(5, 2))
        assert torch.get_num_threads() == 2
        limit_threads(8)
        assert torch.get_num_threads() == 2
        limit_threads(Fraction(1, 2))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
