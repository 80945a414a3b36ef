"""Runs on a real SLURM: the jobs run side by side, and each test checks one of them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from faults import overrides
from training import ROOT, TINY, end_state, metrics

pytestmark = pytest.mark.slow
EXACT = ["precision=fp32", "deterministic=true", "base.epochs=6", "base.lr_milestones=[4]"]


@dataclass
class Job:
    """A batch job: its id, and the run's folder and log."""

    id: str
    folder: Path

    @property
    def log(self) -> str:
        path = self.folder.with_suffix(".log")
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged this step."""
        while not (self.folder / "metrics.jsonl").exists() or max(metrics(self.folder), default=0) < step:
            time.sleep(0.05)


@dataclass
class Jobs:
    uninterrupted: Job  # 1 node × 2 ranks
    signalled: Job  # 2 × 1, receives SIGUSR1
    requeued: Job  # 2 × 1, requeued by scontrol
    failing: Job  # 1 × 2, rank 1 fails


@pytest.fixture(scope="module")
def jobs(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Jobs:
    root = tmp_path_factory.mktemp("jobs")

    def submit(name: str, nodes: int, tasks: int, *extra: str) -> Job:
        resources = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1"]
        output = [f"--output={root / name}.log", "tools/slurm/train.sbatch"]
        run = [*TINY, *EXACT, *extra, f"dataset.root={motion_root}", f"output_dir={root / name}"]
        environment = f"--export=ALL,PYTHON={sys.executable},PYTHONPATH={ROOT / 'tests'}"
        return Job(slurm.sbatch(environment, *resources, *output, *run, cwd=ROOT), root / name)

    started = Jobs(
        uninterrupted=submit("uninterrupted", 1, 2),
        signalled=submit("signalled", 2, 1),
        requeued=submit("requeued", 2, 1, "checkpoint.every_steps=2"),
        failing=submit("failing", 1, 2, *overrides("raise"), "loader.num_workers=0"),
    )
    started.signalled.wait_for_step(3)
    slurm.run("scancel", "--signal=USR1", started.signalled.id)
    started.requeued.wait_for_step(4)
    slurm.run("scontrol", "requeue", started.requeued.id)
    return started


def test_a_job_on_one_node_trains_and_tests(slurm: Cluster, jobs: Jobs) -> None:
    assert slurm.wait(jobs.uninterrupted.id) == "COMPLETED", jobs.uninterrupted.log
    assert "2 ranks" in jobs.uninterrupted.log
    assert (jobs.uninterrupted.folder / "test.json").exists()


@pytest.mark.parametrize("name", ["signalled", "requeued"])
def test_a_requeued_job_ends_with_the_state_of_an_uninterrupted_one(slurm: Cluster, jobs: Jobs, name: str) -> None:
    job: Job = getattr(jobs, name)
    assert slurm.wait(job.id) == "COMPLETED", job.log
    assert slurm.job(job.id)["Restarts"] == "1"
    assert "resumed at step" in job.log
    if name == "signalled":
        assert "stopped by SIGUSR1" in job.log
        assert f"job {job.id} is back in SLURM's queue" in job.log
    slurm.wait(jobs.uninterrupted.id)
    assert end_state(job.folder) == end_state(jobs.uninterrupted.folder)
    assert metrics(job.folder) == metrics(jobs.uninterrupted.folder)
    assert metrics(job.folder, "val_top1") == metrics(jobs.uninterrupted.folder, "val_top1")


def test_a_failing_rank_ends_its_job_with_its_message(slurm: Cluster, jobs: Jobs) -> None:
    assert slurm.wait(jobs.failing.id) == "FAILED", jobs.failing.log
    errors = [
        line
        for line in jobs.failing.log.splitlines()
        if re.match(r"0: error( \(rank 0\))?: rank 1 failed first, at step", line)
    ]
    assert len(errors) == 1, jobs.failing.log
    assert "waiting for a batch: ValueError: a fault made by the tests" in errors[0]


def sweep(slurm: Cluster, folder: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    settings = {"tasks_per_node": ranks, "gpus_per_node": "null", "cpus_per_task": 1}
    resources = [f"hydra.launcher.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "tools/run_net.py"), "--multirun", "launcher=slurm", *resources, *arguments]
    slurm.environment["PYTHONPATH"] = str(ROOT / "tests")
    return slurm.run(*command, cwd=folder, check=False)


def test_a_sweep_is_a_job_array(slurm: Cluster, tmp_path: Path, motion_root: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = [*TINY, f"dataset.root={motion_root}", "output_dir=out_${schedule.name}", "train.evals_per_phase=0"]
    process = sweep(slurm, tmp_path, "schedule=baseline,multigrid", *run)
    assert process.returncode == 0, process.stderr
    for name in ("baseline", "multigrid"):
        assert f"{name}" in (tmp_path / f"out_{name}" / "report.md").read_text()


def test_a_failing_rank_of_a_sweep_is_reported_to_its_caller(slurm: Cluster, tmp_path: Path, motion_root: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = [*TINY, *overrides("raise"), "loader.num_workers=0", f"dataset.root={motion_root}", "output_dir=out"]
    process = sweep(slurm, tmp_path, "seed=0", *run, ranks=2)
    assert process.returncode == 1, process.stderr
    assert "error: rank 1 failed first, at step" in process.stderr
