"""Runs of a table as processes of `mgvideo run`: one after another, or through a launcher all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mgvideo.distributed.signals import raise_if_stopped, received_signal
from mgvideo.errors import UserError
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Plan, require
from mgvideo.storage.checkpoints import Checkpoints, write_atomic
from mgvideo.tracking.run_logger import Eta

from .help import group_options
from .tables import Entry, key_of, merged
from .values import quote

LOG = "run.log"  # in a run's folder: all that it printed
LAUNCHER = "hydra.launcher"  # where its keys are


@dataclass
class Job:
    """One run: a cell with a seed, in a folder of its own."""

    entry: Entry
    seed: int
    out: Path
    processes: int

    @property
    def name(self) -> str:
        """For people, and the run's folder."""
        return f"{self.entry.cell.name}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's output_dir."""
        return self.out / self.name

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """What makes the run what it is."""
        return {**self.entry.recipe(), "seed": self.seed}

    def differing(self) -> list[str]:
        """Keys in which an earlier run in this folder differs, with both values."""
        made = _json(self.folder / "cell.json")
        shared = [key for key in self.recipe if key in made]
        now = json.loads(json.dumps(self.recipe))
        return [f"{key} was {made[key]}, is {now[key]}" for key in shared if made[key] != now[key]]

    def finished(self) -> bool:
        """Whether its report is there, and of this recipe."""
        return (self.folder / "report.json").exists() and not self.differing()

    def begin(self) -> None:
        """Leave the recipe in its folder; a report of another is no longer one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "report.json").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into out={self.out}: {error.strerror}") from error
        write_atomic(self.folder / "cell.json", json.dumps(self.recipe, indent=1).encode())

    def starts_from(self) -> list[str]:
        """The override that gives it another cell's weights, of the same seed."""
        if self.entry.cell.weights_of is None:
            return []
        first = self.out / f"{self.entry.cell.weights_of}_seed{self.seed}"
        made = Checkpoints(first / "checkpoints")
        steps = made.steps()
        if not steps or not (first / "report.json").exists():
            raise UserError(f"it starts from the weights of {first.name}, which is not finished")
        return [f"init_from={quote(made.path(steps[-1]))}"]

    def command(self) -> list[str]:
        """The process that does it."""
        run = ["-m", "mgvideo.cli", "run", *self.entry.overrides, *self.starts_from()]
        run += [f"seed={self.seed}", f"output_dir={quote(self.folder.resolve())}"]
        if self.processes == 1:
            return [sys.executable, *run]
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return [sys.executable, *ranks, *run]


class Following:
    """Where a run is, by what it leaves in its folder; call it now and then."""

    def __init__(self, job: Job) -> None:
        self.job, self.position = job, 0
        self.plan: Plan | None = None
        self.eta: Eta | None = None
        self.last: dict[str, Any] = {"step": 0, "seconds": 0.0}
        self.score = ""
        self.since = time.time()

    def update(self) -> None:
        """Read what has come since the last call."""
        path = self.job.folder / "plan.json"
        if self.plan is None and path.exists() and path.stat().st_mtime >= self.since - 1:
            self.plan = Plan.from_json(_json(path))
            self.eta = Eta(self.plan)
        metrics = self.job.folder / "metrics.jsonl"
        if self.plan is None or not metrics.exists():
            return
        if metrics.stat().st_size < self.position:  # cut back to the checkpoint that the run goes on from
            self.position = 0
        with open(metrics, encoding="utf-8") as file:
            file.seek(self.position)
            while (line := file.readline()).endswith("\n"):
                self.position = file.tell()
                with suppress(ValueError):
                    self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        score = next((f"{key[4:]} {value:.1f}" for key, value in record.items() if key.startswith("val_")), None)
        if score:
            self.score = score
            return
        if self.eta and record["step"] > self.last["step"]:
            seconds, steps = record["seconds"] - self.last["seconds"], record["step"] - self.last["step"]
            self.eta.add(record["phase"], seconds, steps)
        self.last = record

    def left(self) -> float | None:
        """Seconds of training left, None where it is too early to say."""
        return self.eta.seconds_left(self.last["step"]) if self.eta else None

    def __str__(self) -> str:
        if self.plan is None or self.last["step"] == 0:
            return "starting"
        left = self.left()
        parts = [f"step {self.last['step']}/{self.plan.steps}", f"loss {self.last['loss']:.2f}", self.score]
        parts.append(
            "testing" if self.last["step"] == self.plan.steps else f"{format_duration(left)} left" if left else ""
        )
        return " · ".join(part for part in parts if part)


def start(command: Sequence[str], folder: Path) -> subprocess.Popen:
    """A process whose output goes to the folder's log; it shares our terminal, so Ctrl-C reaches it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "a", encoding="utf-8", errors="surrogateescape") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # the log is a file, whatever the terminal shows
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def wait(processes: Sequence[subprocess.Popen], beat: Callable[[], None], every: float = 0.5) -> None:
    """Wait for processes; a signal to stop is passed on, and raised as Stopped when they have left."""
    passed_on = False
    try:
        while any(process.poll() is None for process in processes):
            if received_signal() and not passed_on:
                passed_on = True
                for process in processes:
                    if process.poll() is None:
                        process.send_signal(received_signal())
            beat()
            time.sleep(every)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    raise_if_stopped()


def why(code: int, folder: Path) -> str:
    """What a failed process said last: its error line where it has one."""
    lines = _text(folder / LOG).splitlines()
    own = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0) :]
    told = [line for line in own if line.startswith("error")] or [line for line in own if line.strip()]
    return told[-1].removeprefix("error: ") if told else f"it ended with code {code}"


def placed(job: Job, launcher: str, queue: Sequence[str]) -> list[str]:
    """A launcher's overrides that give a run its processes: on SLURM spread over the nodes asked for, a GPU each.

    Raises UserError where the launcher would start another number of them.
    """
    name, processes = job.entry.cell.name, job.processes
    if launcher != "slurm":
        told = f"cell {name} takes {processes} processes, launcher={launcher} starts one"
        require(processes == 1, f"{told}: give launcher=slurm or none, processes=1, or other cells=[…]")
        return list(queue)
    given = {key_of(override): override.partition("=")[2] for override in queue}
    require(
        f"{LAUNCHER}.tasks_per_node" not in given, f"{LAUNCHER}.tasks_per_node: give processes=…, those of all nodes"
    )
    asked = given.get(f"{LAUNCHER}.nodes", "1")
    require(asked.isdecimal() and int(asked) > 0, f"{LAUNCHER}.nodes={asked}: give a whole number from 1 up")
    nodes = min(int(asked), processes)  # a cell of one process needs no second node
    require(
        processes % nodes == 0,
        f"{LAUNCHER}.nodes={asked}: {processes} processes of cell {name} do not share them evenly",
    )
    each = processes // nodes
    ours = [f"{LAUNCHER}.nodes={nodes}", f"{LAUNCHER}.tasks_per_node={each}"]
    # as many GPUs, unless the queue says otherwise: 0 where there are none
    return merged([f"{LAUNCHER}.gpus_per_node={each}"], queue, ours)


def sweep(jobs: Sequence[Job], launcher: str, queue: Sequence[str]) -> list[str]:
    """The command that runs one cell's seeds through a Hydra launcher."""
    first = jobs[0]
    group = "launcher" if launcher in group_options()["launcher"] else "hydra/launcher"
    folder = first.out.resolve() / f"{first.entry.cell.name}_seed"
    run = ["-m", "mgvideo.cli", "run", "--multirun", f"{group}={launcher}", *first.entry.overrides]
    run += placed(first, launcher, queue)
    before = f"{first.entry.cell.weights_of}_seed"
    run += [given.replace(f"{before}{first.seed}", f"{before}${{seed}}") for given in first.starts_from()]
    run += [f"seed={','.join(str(job.seed) for job in jobs)}", f"output_dir={quote(f'{folder}${{seed}}')}"]
    run += [f"hydra.sweep.dir={quote(sweep_folder(first).resolve())}"]
    return [sys.executable, *run]


def sweep_folder(job: Job) -> Path:
    """Where a launcher leaves its own files, and our log of it."""
    return job.out / ".sweeps" / job.entry.cell.name


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
