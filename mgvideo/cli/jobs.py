"""Start the runs of a table as processes of `mgvideo run`: one after another, or all at once through a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mgvideo.cpu.resources import available_cpus, set_cpu_affinity
from mgvideo.distributed.signals import raise_if_stopped, received_signal
from mgvideo.errors import UserError
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Plan, require
from mgvideo.storage.checkpoints import Checkpoints, describe_differences
from mgvideo.storage.files import parse_json_lines, write_atomic
from mgvideo.storage.paths import explain_write_errors
from mgvideo.tracking.run_logger import Eta

from .help import group_options
from .tables import TableEntry, merge_overrides
from .values import override_key, quote

LOG_NAME = "run.log"  # file in a run's folder with its stdout and stderr
LAUNCHER = "hydra.launcher"  # config node of the launcher's keys


@dataclass
class Job:
    """One run: a cell of a table with a seed, in its own folder below `out`."""

    entry: TableEntry
    seed: int
    out: Path
    processes: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{self.entry.cell.name}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's `output_dir`."""
        return self.out / self.name

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The keys that determine the run's result; see `TableEntry.recipe`."""
        return {**self.entry.recipe(), "seed": self.seed}

    def recipe_differences(self) -> list[str]:
        """List the keys in which an earlier run in this folder differs, as `KEY was OLD, is NEW`."""
        old = _read_json(self.folder / "cell.json")
        new = json.loads(json.dumps(self.recipe))
        shared = old.keys() & new.keys()
        return describe_differences({key: old[key] for key in shared}, {key: new[key] for key in shared})

    def is_finished(self) -> bool:
        """Return whether the folder holds a report of this recipe."""
        return (self.folder / "report.json").exists() and not self.recipe_differences()

    def prepare_folder(self, jobs_at_once: int = 1) -> None:
        """Create the folder, write the recipe and `jobs_at_once` to `cell.json`, and remove an old report.

        Raises:
            UserError: the folder cannot be written.
        """
        with explain_write_errors("out", self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "report.json").unlink(missing_ok=True)
        content = {**self.recipe, **({"jobs_at_once": jobs_at_once} if jobs_at_once > 1 else {})}
        write_atomic(self.folder / "cell.json", json.dumps(content, indent=1).encode())

    def initial_weights(self) -> list[str]:
        """Return the `init_from=` override for a cell that starts from another cell's weights, with the same seed.

        Raises:
            UserError: that run is not finished.
        """
        if self.entry.cell.weights_of is None:
            return []
        first = self.out / f"{self.entry.cell.weights_of}_seed{self.seed}"
        checkpoints = Checkpoints(first / "checkpoints")
        steps = checkpoints.steps()
        if not steps or not (first / "report.json").exists():
            raise UserError(f"it starts from the weights of {first.name}, which is not finished")
        return [f"init_from={quote(checkpoints.path(steps[-1]))}"]

    def command(self) -> list[str]:
        """Return the command line of the run: one process, or `torch.distributed.run` with several."""
        run = ["-m", "mgvideo.cli", "run", *self.entry.overrides, *self.initial_weights()]
        run += [f"seed={self.seed}", f"output_dir={quote(self.folder.resolve())}"]
        if self.processes == 1:
            return [sys.executable, *run]
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return [sys.executable, *ranks, *run]


class RunProgress:
    """Progress of a run, read from the files in its folder. Call `update` from time to time."""

    def __init__(self, job: Job) -> None:
        self.job, self.position = job, 0
        self.plan: Plan | None = None
        self.eta: Eta | None = None
        self.last: dict[str, Any] = {"step": 0, "seconds": 0.0}
        self.score = ""
        self.since = time.time()

    def update(self) -> None:
        """Read the lines of metrics.jsonl that are new since the last call."""
        path = self.job.folder / "plan.json"
        if self.plan is None and path.exists() and path.stat().st_mtime >= self.since - 1:
            self.plan = Plan.from_json(_read_json(path))
            self.eta = Eta(self.plan)
        metrics = self.job.folder / "metrics.jsonl"
        if self.plan is None or not metrics.exists():
            return
        if metrics.stat().st_size < self.position:  # a resumed run truncates the file to its checkpoint
            self.position = 0
        with open(metrics, encoding="utf-8") as file:
            file.seek(self.position)
            while (line := file.readline()).endswith("\n"):
                self.position = file.tell()
                for record in parse_json_lines([line]):
                    self._add_record(record)

    def _add_record(self, record: dict[str, Any]) -> None:
        score = next((f"{key[4:]} {value:.1f}" for key, value in record.items() if key.startswith("val_")), None)
        if score:
            self.score = score
            return
        if self.eta and record["step"] > self.last["step"]:
            seconds, steps = record["seconds"] - self.last["seconds"], record["step"] - self.last["step"]
            self.eta.add(record["phase"], seconds, steps)
        self.last = record

    def seconds_left(self) -> float | None:
        """Return the seconds of training left, or None while no estimate is possible."""
        return self.eta.seconds_left(self.last["step"]) if self.eta else None

    def __str__(self) -> str:
        if self.plan is None or self.last["step"] == 0:
            return "starting"
        left = self.seconds_left()
        parts = [f"step {self.last['step']}/{self.plan.steps}", f"loss {self.last['loss']:.2f}", self.score]
        parts.append(
            "testing" if self.last["step"] == self.plan.steps else f"{format_duration(left)} left" if left else ""
        )
        return " · ".join(part for part in parts if part)


def split_cpus(jobs: int) -> list[frozenset[int]]:
    """Divide the CPUs of this process among `jobs` runs at once; with more runs than CPUs, several share one."""
    cpus = sorted(available_cpus())
    if jobs > len(cpus):
        return [frozenset({cpus[i % len(cpus)]}) for i in range(jobs)]
    return [frozenset(cpus[i * len(cpus) // jobs : (i + 1) * len(cpus) // jobs]) for i in range(jobs)]


def start_process(command: Sequence[str], folder: Path, cpus: frozenset[int] | None = None) -> subprocess.Popen:
    """Start a process that appends its output to the folder's log; it runs on `cpus` alone, if the system allows that.

    It stays in this process group, so Ctrl-C in the terminal reaches it too.
    """
    if cpus is not None:
        own = available_cpus()
        set_cpu_affinity(cpus)  # the process inherits it
        try:
            return start_process(command, folder)
        finally:
            set_cpu_affinity(own)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG_NAME, "a", encoding="utf-8", errors="surrogateescape") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # the log is UTF-8 even if the terminal is not
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def wait_for_processes(
    processes: Sequence[subprocess.Popen], on_poll: Callable[[], None], interval_s: float = 0.5, first: bool = False
) -> None:
    """Wait for processes to exit, all or with `first` one of them, and call `on_poll` every `interval_s` seconds.

    A stop signal is forwarded to them once; `Stopped` is raised after they have exited.
    """
    forwarded = False
    try:
        while (all if first and not forwarded else any)(process.poll() is None for process in processes):
            if received_signal() and not forwarded:
                forwarded = True
                for process in processes:
                    if process.poll() is None:
                        process.send_signal(received_signal())
            on_poll()
            time.sleep(interval_s)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    raise_if_stopped()


def failure_reason(code: int, folder: Path) -> str:
    """Return why a process failed: the last error line of its log, else the last line, else its exit code."""
    lines = _read_text(folder / LOG_NAME).splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0)  # of the last command
    errors = [line for line in lines[start:] if line.startswith("error")]
    messages = errors or [line for line in lines[start:] if line.strip()]
    return messages[-1].removeprefix("error: ") if messages else f"it exited with code {code}"


def launcher_overrides(job: Job, launcher: str, queue: Sequence[str]) -> list[str]:
    """Return the launcher overrides that start the processes of a run; on SLURM, spread evenly over the nodes.

    Each process gets one GPU unless `queue`, the launcher overrides of the command line, sets `gpus_per_node`.

    Raises:
        UserError: the launcher cannot start this number of processes.
    """
    name, processes = job.entry.cell.name, job.processes
    if launcher != "slurm":
        problem = f"cell {name} takes {processes} processes, launcher={launcher} starts one"
        require(processes == 1, f"{problem}: give launcher=slurm or none, processes=1, or other cells=[…]")
        return list(queue)
    values = {override_key(override): override.partition("=")[2] for override in queue}
    require(
        f"{LAUNCHER}.tasks_per_node" not in values,
        f"{LAUNCHER}.tasks_per_node: give processes=…, the number on all nodes, instead",
    )
    nodes_text = values.get(f"{LAUNCHER}.nodes", "1")
    require(
        nodes_text.isdecimal() and int(nodes_text) > 0, f"{LAUNCHER}.nodes={nodes_text}: give a whole number from 1 up"
    )
    nodes = min(int(nodes_text), processes)  # one process does not need a second node
    require(
        processes % nodes == 0,
        f"{LAUNCHER}.nodes={nodes_text}: {processes} processes of cell {name} cannot be spread evenly over the nodes",
    )
    tasks = processes // nodes
    fixed = [f"{LAUNCHER}.nodes={nodes}", f"{LAUNCHER}.tasks_per_node={tasks}"]
    # `queue` may set gpus_per_node to another number, such as 0 on CPU nodes
    return merge_overrides([f"{LAUNCHER}.gpus_per_node={tasks}"], queue, fixed)


def sweep_command(jobs: Sequence[Job], launcher: str, queue: Sequence[str]) -> list[str]:
    """Return the command that runs all seeds of one cell through a Hydra launcher."""
    first = jobs[0]
    group = "launcher" if launcher in group_options()["launcher"] else "hydra/launcher"
    folder = first.out.resolve() / f"{first.entry.cell.name}_seed"
    run = ["-m", "mgvideo.cli", "run", "--multirun", f"{group}={launcher}", *first.entry.overrides]
    run += launcher_overrides(first, launcher, queue)
    weights_prefix = f"{first.entry.cell.weights_of}_seed"
    run += [
        override.replace(f"{weights_prefix}{first.seed}", f"{weights_prefix}${{seed}}")
        for override in first.initial_weights()
    ]
    run += [f"seed={','.join(str(job.seed) for job in jobs)}", f"output_dir={quote(f'{folder}${{seed}}')}"]
    run += [f"hydra.sweep.dir={quote(sweep_folder(first).resolve())}"]
    return [sys.executable, *run]


def sweep_folder(job: Job) -> Path:
    """Return the folder for the launcher's own files and its log."""
    return job.out / ".sweeps" / job.entry.cell.name


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
