"""`mgvideo reproduce`: a table of the paper, from one command: its cells run, resumed, brought together and drawn."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from mgvideo.distributed.signals import Stopped, handle_signals, raise_if_stopped
from mgvideo.errors import UserError
from mgvideo.plan.forecast import read_benchmark
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import require
from mgvideo.reproduce.figure import draw_results
from mgvideo.reproduce.page import render_page
from mgvideo.reproduce.results import ReportRow, Results, read_outcome
from mgvideo.reproduce.tables import ResultTable
from mgvideo.storage.checkpoints import write_atomic

from . import app, keys, prices
from .build import require_dataset_keys
from .jobs import LOG, Following, Job, placed, start, sweep, sweep_folder, wait, why
from .schema import key
from .tables import Entry, entries, load_table, tables

RUNS = "runs"  # folder of all cells below out, shared by the preset's tables
EVERY = 60.0  # seconds between two lines of a log file


@dataclass
class ReproduceKeys:
    """What this program takes besides the keys of a run."""

    table: str | None = key(None, "which table; null: list them all")
    preset: str = key("motion", "motion, kinetics, charades or ssv2")
    seeds: list[int] | None = key(None, "seeds of each cell, as in [0,1,2]; null: the preset's")
    out: str | None = key(None, "folder of runs and reports, shared by a preset's tables; null: runs/tables/PRESET")
    processes: int | None = key(None, "processes of a run, one a GPU; null: the preset's")
    launcher: str | None = key(None, "a Hydra launcher, such as slurm: all cells at once, a cell's seeds one sweep")
    weights: str | None = key(None, "folder of released weights, as the table names them")
    gpus: int = key(8, "with benchmark: GPUs that the times are for")
    cells: list[str] | None = key(None, "which cells to run, as in [baseline,multigrid]; null: all of the table")
    benchmark: str | None = key(None, "JSON of measured step times, as mgvideo plan takes: --list gives times")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo reproduce` and tools/reproduce.py."""
    if {"-h", "--help"} & set(arguments):
        print(_description())
        return
    with app.exit_on_user_error():
        own, rest = keys.split(ReproduceKeys, [argument for argument in arguments if argument != "--list"])
        given, rest = keys.read(ReproduceKeys, own), app.quote_texts("run", rest)
        require(given.processes is None or given.processes >= 1, f"processes={given.processes}: give 1 or more")
        require(given.seeds is None or len(set(given.seeds)) == len(given.seeds) > 0, "seeds: give different numbers")
        if given.table is None or "--list" in arguments:
            show(given, rest)
            return
        table = load_table(given.table, given.preset)
        queue = [override for override in rest if override.lstrip("+").startswith("hydra")]
        require(given.launcher is not None or not queue, f"{' '.join(queue)}: is of a launcher, give launcher=… too")
        cells = entries(table, [override for override in rest if override not in queue], given.weights)
        command = f"python tools/reproduce.py {shlex.join(arguments)}"
        failed = Reproduction(given, table, cells, command, queue).run()
    if failed:
        raise SystemExit(1)


def _description() -> str:
    names = [f"  {name:<12} {', '.join(presets)}" for name, presets in tables().items()]
    return "\n".join([
        "Run the cells of a table that are not done yet, and report: report.md, report.csv, report.html and figures.",
        "",
        "  python tools/reproduce.py table=schedules                      the embedded dataset, minutes a cell",
        "  python tools/reproduce.py table=schedules --list               what it would cost",
        "  python tools/reproduce.py table=tradeoff preset=kinetics launcher=slurm dataset.root=/data/k400",
        "",
        "Tables and their presets:",
        *names,
        "",
        "Keys:",
        *keys.describe(ReproduceKeys),
        "",
        "All other keys are those of a run (python tools/run_net.py --help) and hold for every cell.",
        "--list shows cells and costs, and starts nothing.",
    ])  # fmt: skip


def show(given: ReproduceKeys, overrides: Sequence[str]) -> None:
    """The table, or all that the preset has, and what it costs."""
    benchmark = read_benchmark(given.benchmark) if given.benchmark else None
    for name in [given.table] if given.table else [name for name, has in tables().items() if given.preset in has]:
        table = load_table(name, given.preset)
        cells = entries(table, overrides, given.weights)
        prices.show(table, cells, len(given.seeds or table.preset.seeds), benchmark, given.gpus)


class Reproduction:
    """One call of the program: what is to be done, what failed, and the report of what is there."""

    def __init__(
        self, given: ReproduceKeys, table: ResultTable, cells: Sequence[Entry], command: str, queue: Sequence[str] = ()
    ) -> None:
        self.given, self.table, self.cells, self.command, self.queue = given, table, cells, command, queue
        out = Path(given.out or f"runs/tables/{table.preset.name}")
        self.folder = out / table.name
        self.failures: dict[str, str] = {}
        self._check_cells()
        self.jobs = [
            Job(entry, seed, out / RUNS, entry.cell.processes or given.processes or table.preset.processes)
            for entry in cells
            if entry.missing is None
            for seed in given.seeds or table.preset.seeds
        ]
        self.chosen = [job for job in self.jobs if given.cells is None or job.entry.cell.name in given.cells]
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        self.spent: list[tuple[float, float]] = []  # seconds and FLOPs of the runs that were made here

    def run(self) -> bool:
        """Do all that is left, and report; True where something failed."""
        self._check()
        todo = [job for job in self._in_order() if not job.finished()]
        self.console.print(f"{self.table.title}: {len(self.chosen)} runs, {len(self.chosen) - len(todo)} done before")
        for entry in self.cells:
            if entry.missing:
                self.console.print(f"not run: {entry.cell.title}: {entry.missing}")
        with handle_signals():
            try:
                if self.given.launcher:
                    self._all_at_once(todo)
                else:
                    self._in_turn(todo)
            except Stopped as stop:
                self.report()
                self.console.print(f"stopped by {stop.name}; the same command goes on")
                raise
        self.report()
        for name, reason in self.failures.items():
            print(f"error: {name} failed: {reason}", file=sys.stderr)
        self.console.print(f"report: {self.folder / 'report.html'}, report.md, report.csv")
        return bool(self.failures)

    def _check_cells(self) -> None:
        names = [cell.name for cell in self.table.cells]
        unknown = [name for name in self.given.cells or [] if name not in names]
        require(not unknown, f"cells: table {self.table.name} has no {', '.join(unknown)}, but {', '.join(names)}")

    def _check(self) -> None:
        """Refuse before anything starts what cannot end well."""
        if not self.chosen:
            missing = "; ".join(dict.fromkeys(e.missing for e in self.cells if e.missing))
            raise UserError(f"no cell of table {self.table.name} can run: {missing}; give weights=FOLDER with it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into out={self.folder}: {error.strerror}") from error
        for entry in self.cells:
            if any(job.entry is entry for job in self.chosen):
                require_dataset_keys(entry.config)
                _ = entry.plan  # recipe, schedule and dataset fit together
        for job in self.chosen:
            if self.given.launcher:
                placed(job, self.given.launcher, self.queue)
            differing = [line for line in job.differing() if not line.startswith("test.")]
            if differing:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                told = f"{job.folder} was made by another recipe: {'; '.join(differing[:3])}{more}"
                raise UserError(f"{told}. Give another out=FOLDER, or remove that folder")

    def _in_order(self) -> list[Job]:
        """Cells that others start from come first."""
        return sorted(self.chosen, key=lambda job: job.entry.cell.weights_of is not None)

    def _in_turn(self, todo: Sequence[Job]) -> None:
        for i, job in enumerate(todo):
            raise_if_stopped()
            place = f"[{len(self.chosen) - len(todo) + i + 1}/{len(self.chosen)}] {job.name}"
            try:
                job.begin()
                command = job.command()
            except UserError as error:
                self.failures[job.name] = str(error)
                continue
            following, began = Following(job), time.monotonic()
            self.console.print(f"{place} starts, log {job.folder / LOG}")
            with Line(self.console) as line:
                process = start(command, job.folder)
                wait([process], self._beat(line, place, following, todo[i + 1 :], began))
            self._ended(job, process.returncode, time.monotonic() - began)
            self.report()

    def _ended(self, job: Job, code: int, seconds: float) -> None:
        if code == 0 and job.finished():
            scores = read_outcome(job.folder, job.seed).report["metrics"]
            told = " · ".join(f"{name} {value:.2f} %" for name, value in scores.items())
            self.spent.append((seconds, job.entry.flops(job.entry.plan)))
            self.console.print(f"  {job.name} done in {format_duration(seconds)} · {told}")
        else:
            self.failures[job.name] = why(code, job.folder)
            self.console.print(f"  {job.name} failed after {format_duration(seconds)}: {self.failures[job.name]}")

    def _beat(
        self, line: Line, place: str, following: Following, later: Sequence[Job], began: float
    ) -> Callable[[], None]:
        """What to show while a run goes on: where it is, and how long the rest of the table will take."""
        own = following.job.entry.flops(following.job.entry.plan)
        rest = sum(job.entry.flops(job.entry.plan) for job in later)

        def beat() -> None:
            following.update()
            left, elapsed = following.left(), time.monotonic() - began
            known = [*self.spent, *([(elapsed + left, own)] if left is not None else [])]
            pace = sum(flops for _, flops in known)
            after = (
                f" · table {format_duration((left or 0) + rest * sum(s for s, _ in known) / pace)} left" if pace else ""
            )
            line.show(f"{place} · {following}{after if later else ''}")

        return beat

    def _all_at_once(self, todo: Sequence[Job]) -> None:
        """Through a launcher: first the cells that others start from, with all that wait for nobody."""
        launcher = str(self.given.launcher)
        for waiting in (False, True):
            wave: dict[str, list[Job]] = {}
            for job in todo:
                if (job.entry.cell.weights_of is not None) == waiting:
                    wave.setdefault(job.entry.cell.name, []).append(job)
            processes = {}
            for name, jobs in wave.items():
                try:
                    for job in jobs:
                        job.begin()
                    folder = sweep_folder(jobs[0])
                    processes[name] = start(sweep(jobs, launcher, self.queue), folder)
                    self.console.print(f"{name}: {len(jobs)} runs, log {folder / LOG}")
                except UserError as error:
                    self.failures |= {job.name: str(error) for job in jobs}
            jobs = [job for each in wave.values() for job in each]
            with Line(self.console) as line:
                wait([*processes.values()], partial(_count, line, jobs), every=2.0)
            for name, process in processes.items():
                for job in wave[name]:
                    if not job.finished():
                        self.failures[job.name] = why(process.returncode, sweep_folder(job))
            self.report()

    def report(self) -> None:
        """Write the report of all that is finished."""
        rows = []
        for entry in self.cells:
            jobs = [job for job in self.jobs if job.entry is entry]
            outcomes = tuple(read_outcome(job.folder, job.seed) for job in jobs if job.finished())
            failed = "; ".join(
                f"{job.name} failed: {self.failures[job.name]}" for job in jobs if job.name in self.failures
            )
            left = f"{len(jobs) - len(outcomes)} of {len(jobs)} runs not made yet" if len(outcomes) < len(jobs) else ""
            flops = entry.flops(outcomes[0].plan) if outcomes else 0.0
            rows.append(ReportRow(entry.cell, outcomes, flops, entry.missing or failed or left))
        results = Results(self.table, tuple(rows), self.command)
        figures = draw_results(results, self.folder)
        write_atomic(
            self.folder / "report.md", results.markdown([f"{name}.png" for name in figures]).encode(errors="replace")
        )
        write_atomic(self.folder / "report.csv", results.csv().encode(errors="replace"))
        svg = [self.folder / f"{name}.svg" for name in figures]
        write_atomic(self.folder / "report.html", render_page(results, svg).encode(errors="replace"))


def _count(line: Line, jobs: Sequence[Job]) -> None:
    line.show(f"{sum((job.folder / 'report.json').exists() for job in jobs)} of {len(jobs)} runs done")


class Line:
    """A line of the terminal that changes in place; in a log file a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console, self.told = console, time.monotonic()
        self.status = console.status("starting", refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> Line:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def show(self, text: str) -> None:
        """Say it."""
        if self.status:
            self.status.update(text)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.console.print(text)
