"""`mgvideo reproduce`: run or resume the cells of a table of the paper, and report their results."""

from __future__ import annotations

import shlex
import subprocess
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
from mgvideo.plan.formatting import format_duration, shorten
from mgvideo.plan.plan import require
from mgvideo.reproduce.figure import draw_results
from mgvideo.reproduce.page import render_page
from mgvideo.reproduce.results import ReportRow, Results, read_outcome
from mgvideo.reproduce.tables import Cell, ResultTable
from mgvideo.reproduce.time_to_accuracy import describe_times
from mgvideo.storage.files import write_atomic
from mgvideo.storage.paths import explain_write_errors

from . import app, keys, prices
from .build import require_dataset_keys
from .jobs import (
    LOG_NAME,
    Job,
    RunProgress,
    failure_reason,
    launcher_overrides,
    split_cpus,
    start_process,
    sweep_command,
    sweep_folder,
    wait_for_processes,
)
from .schema import key
from .tables import TableEntry, compose_entries, load_table, presets_by_table

RUNS_FOLDER = "runs"  # folder of all runs below `out`, shared by the tables of a preset
LOG_INTERVAL_S = 60.0  # between two lines of a log file


@dataclass
class ReproduceKeys:
    """Keys of this program, besides the keys of a run."""

    table: str | None = key(None, "table to reproduce; null: list all tables")
    preset: str = key("motion", "motion, motion112, camera, kinetics, charades or ssv2")
    seeds: list[int] | None = key(None, "seeds of each cell, such as [0,1,2]; null: those of the preset")
    out: str | None = key(
        None, "folder of runs and reports, shared by the tables of a preset; null: runs/tables/PRESET"
    )
    processes: int | None = key(None, "processes of a run, one per GPU; null: those of the preset", least=1)
    jobs: int = key(1, "runs at once on this machine, which share its GPUs and divide its CPU cores", least=1)
    launcher: str | None = key(
        None, "a Hydra launcher, such as slurm: runs all cells at once, the seeds of a cell as one sweep"
    )
    weights: str | None = key(None, "folder of released weights, with the file names that the table lists")
    gpus: int | None = key(
        None, "with benchmark: GPUs to predict times for; null: one for each process of a run", least=1
    )
    cells: list[str] | None = key(None, "cells to run and report, such as [baseline,multigrid]; null: all")
    rows: list[str] | None = key(None, "rows of the table to run and report, such as [SlowFast]; null: all")
    benchmark: str | None = key(None, "JSON of measured step times, as for mgvideo plan: adds times to --list")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo reproduce` and tools/reproduce.py."""
    if {"-h", "--help"} & set(arguments):
        print(_description())
        return
    with app.exit_on_user_error():
        own_overrides, run_overrides = keys.split(
            ReproduceKeys, [argument for argument in arguments if argument != "--list"]
        )
        options, run_overrides = keys.read(ReproduceKeys, own_overrides), app.quote_texts("run", run_overrides)
        require(
            options.seeds is None or len(set(options.seeds)) == len(options.seeds) > 0, "seeds: give different numbers"
        )
        chooses_cells = options.cells is not None or options.rows is not None
        require(options.table is not None or not chooses_cells, "cells and rows are those of one table: add table=…")
        if options.table is None or "--list" in arguments:
            show(options, run_overrides)
            return
        require(options.jobs == 1 or options.launcher is None, "give jobs=N or launcher=…, not both")
        table = load_table(options.table, options.preset)
        queue = [override for override in run_overrides if override.lstrip("+").startswith("hydra")]
        require(options.launcher is not None or not queue, f"{' '.join(queue)}: is a key of a launcher; add launcher=…")
        shared = [override for override in run_overrides if override not in queue]
        entries = compose_entries(table, shared, options.weights)
        command = f"python tools/reproduce.py {shlex.join(arguments)}"
        failed = Reproduction(options, table, entries, command, queue).run()
    if failed:
        raise SystemExit(1)


def _description() -> str:
    names = [f"  {name:<12} {', '.join(presets)}" for name, presets in presets_by_table().items()]
    return "\n".join([
        "Run the unfinished cells of a table, and write report.md, report.csv, report.html and figures.",
        "",
        "  python tools/reproduce.py table=schedules                      the embedded dataset, minutes per cell",
        "  python tools/reproduce.py table=schedules --list               its cost",
        "  python tools/reproduce.py table=beyond jobs=8                  eight runs at once on one GPU",
        "  python tools/reproduce.py table=tradeoff preset=kinetics launcher=slurm dataset.root=/data/k400",
        "",
        "Tables and their presets:",
        *names,
        "",
        "Keys:",
        *keys.describe(ReproduceKeys),
        "",
        "All other keys are those of a run (python tools/run_net.py --help) and apply to every cell.",
        "--list prints cells and costs, and starts no run.",
    ])  # fmt: skip


def show(options: ReproduceKeys, overrides: Sequence[str]) -> None:
    """Print the costs of the table, or of all tables of the preset."""
    benchmark = read_benchmark(options.benchmark) if options.benchmark else None
    names = [name for name, presets in presets_by_table().items() if options.preset in presets]
    for name in [options.table] if options.table else names:
        table = load_table(name, options.preset)
        entries = compose_entries(table, overrides, options.weights)
        if options.table:
            chosen = choose_cells(table, options)
            entries = [entry for entry in entries if entry.cell.name in chosen]
        gpus = {entry.cell.name: options.gpus or count_processes(entry.cell, table, options) for entry in entries}
        prices.print_costs(table, entries, len(options.seeds or table.preset.seeds), benchmark, gpus)


def count_processes(cell: Cell, table: ResultTable, options: ReproduceKeys) -> int:
    """Return the number of processes of each run of a cell."""
    return cell.processes or options.processes or table.preset.processes


def choose_cells(table: ResultTable, options: ReproduceKeys) -> set[str]:
    """Return the names of the cells that `cells` and `rows` choose.

    Raises:
        UserError: the table lacks one of them, or no cell is left.
    """
    chosen = {cell.name for cell in table.cells}
    for key_name, wanted, attribute in (("cells", options.cells, "name"), ("rows", options.rows, "row")):
        if wanted is None:
            continue
        present = dict.fromkeys(getattr(cell, attribute) for cell in table.cells)
        unknown = ", ".join(value for value in wanted if value not in present)
        require(not unknown, f"{key_name}: table {table.name} has no {unknown}; choose from {', '.join(present)}")
        chosen &= {cell.name for cell in table.cells if getattr(cell, attribute) in wanted}
    require(bool(chosen), f"cells and rows have no cell of table {table.name} in common")
    return chosen


@dataclass
class RunningJob:
    """A job that runs on this machine."""

    job: Job
    label: str
    progress: RunProgress
    process: subprocess.Popen
    started: float  # on the monotonic clock, seconds
    cpus: frozenset[int] | None  # those it may run on; None: all


def _next_job(waiting: Sequence[Job], running: Sequence[RunningJob]) -> Job | None:
    """Return the first waiting job whose initial weights no unfinished job computes."""
    unfinished = {job.name for job in [*waiting, *(each.job for each in running)]}
    return next((job for job in waiting if f"{job.entry.cell.weights_of}_seed{job.seed}" not in unfinished), None)


class Reproduction:
    """One call of the program: runs the chosen cells, records failures, and reports all finished runs."""

    def __init__(
        self,
        options: ReproduceKeys,
        table: ResultTable,
        entries: Sequence[TableEntry],
        command: str,
        queue: Sequence[str] = (),
    ) -> None:
        self.options, self.table, self.entries, self.command, self.queue = options, table, entries, command, queue
        out = Path(options.out or f"runs/tables/{table.preset.name}")
        self.folder = out / table.name  # of the report
        self.failures: dict[str, str] = {}
        self.names = choose_cells(table, options)
        self.jobs = [
            Job(entry, seed, out / RUNS_FOLDER, count_processes(entry.cell, table, options))
            for entry in entries
            if entry.skip_reason is None
            for seed in options.seeds or table.preset.seeds
        ]
        self.chosen = [job for job in self.jobs if job.entry.cell.name in self.names]
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        self.spent: list[tuple[float, float]] = []  # seconds and FLOPs of the runs finished by this call

    def run(self) -> bool:
        """Run what is unfinished and report. Returns True if a run failed."""
        self._check_runs()
        unfinished = [job for job in self._dependencies_first() if not job.is_finished()]
        self.console.print(
            f"{self.table.title}: {len(self.chosen)} runs, {len(self.chosen) - len(unfinished)} done before"
        )
        for entry in self.entries:
            if entry.skip_reason:
                self.console.print(f"not run: {entry.cell.title}: {entry.skip_reason}")
        with handle_signals():
            try:
                if self.options.launcher:
                    self._run_through_launcher(unfinished)
                else:
                    self._run_locally(unfinished)
            except Stopped as stop:
                self.report()
                self.console.print(f"stopped by {stop.name}; run the same command to resume")
                raise
        self.report()
        for name, reason in self.failures.items():
            print(f"error: {name} failed: {reason}", file=sys.stderr)
        self.console.print(f"report: {self.folder / 'report.html'}, report.md, report.csv")
        return bool(self.failures)

    def _check_runs(self) -> None:
        """Raise UserError, before any run starts, for what would make a run fail."""
        if not self.chosen:
            reasons = "; ".join(dict.fromkeys(e.skip_reason for e in self.entries if e.skip_reason))
            raise UserError(f"no cell of table {self.table.name} can run: {reasons}; give weights=FOLDER with it")
        with explain_write_errors("out", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.entries:
            if any(job.entry is entry for job in self.chosen):
                require_dataset_keys(entry.config)
                _ = entry.plan  # raises UserError if recipe, schedule and dataset do not fit together
        for job in self.chosen:
            if self.options.launcher:
                launcher_overrides(job, self.options.launcher, self.queue)
            differences = [line for line in job.recipe_differences() if not line.startswith("test.")]
            if differences:
                problem = f"{job.folder} holds a run of another recipe: {shorten(differences, 3, '; ')}"
                raise UserError(f"{problem}. Give another out=FOLDER, or remove that folder")

    def _dependencies_first(self) -> list[Job]:
        """Sort the runs so that cells whose weights others start from come first."""
        return sorted(self.chosen, key=lambda job: job.entry.cell.weights_of is not None)

    def _run_locally(self, jobs: Sequence[Job]) -> None:
        """Run the jobs on this machine, `options.jobs` at once."""
        waiting, running = list(jobs), list[RunningJob]()
        slots = split_cpus(self.options.jobs) if self.options.jobs > 1 else [None]
        with StatusLine(self.console) as line:
            while waiting or running:
                raise_if_stopped()
                free = [cpus for cpus in slots if cpus not in [job.cpus for job in running]] or slots
                while waiting and len(running) < self.options.jobs and (job := _next_job(waiting, running)):
                    waiting.remove(job)
                    done = len(self.chosen) - len(waiting)
                    started = self._start(job, f"[{done}/{len(self.chosen)}]", free[0])
                    free = free[1:] or slots
                    running += [started] if started else []
                if not running:
                    continue
                processes = [job.process for job in running]
                wait_for_processes(processes, self._status_callback(line, running, waiting), first=True)
                for ended in [job for job in running if job.process.poll() is not None]:
                    running.remove(ended)
                    self._record_end(ended.job, ended.process.returncode, time.monotonic() - ended.started)
                self.report()

    def _start(self, job: Job, number: str, cpus: frozenset[int] | None) -> RunningJob | None:
        """Start a run; None if it cannot start, which is recorded as its failure."""
        try:
            job.prepare_folder(self.options.jobs)
            command = job.command()
        except UserError as error:
            self.failures[job.name] = str(error)
            return None
        self.console.print(f"{number} {job.name} starts, log {job.folder / LOG_NAME}")
        progress, started = RunProgress(job), time.monotonic()
        return RunningJob(
            job, f"{number} {job.name}", progress, start_process(command, job.folder, cpus), started, cpus
        )

    def _record_end(self, job: Job, code: int, seconds: float) -> None:
        if code == 0 and job.is_finished():
            scores = read_outcome(job.folder, job.seed).report["metrics"]
            text = " · ".join(f"{name} {value:.2f} %" for name, value in scores.items())
            self.spent.append((seconds, job.entry.flops(job.entry.plan)))
            self.console.print(f"  {job.name} done in {format_duration(seconds)} · {text}")
        else:
            self.failures[job.name] = failure_reason(code, job.folder)
            self.console.print(f"  {job.name} failed after {format_duration(seconds)}: {self.failures[job.name]}")

    def _status_callback(
        self, line: StatusLine, running: Sequence[RunningJob], waiting: Sequence[Job]
    ) -> Callable[[], None]:
        """Return a callback that shows the progress of the runs and the time left for the whole table."""
        waiting_flops = sum(job.entry.flops(job.entry.plan) for job in waiting)

        def show_progress() -> None:
            runs, left = list(self.spent), [0.0]
            for each in running:
                each.progress.update()
                seconds_left, elapsed = each.progress.seconds_left(), time.monotonic() - each.started
                if seconds_left is not None:
                    runs.append((elapsed + seconds_left, each.job.entry.flops(each.job.entry.plan)))
                    left.append(seconds_left)
            seconds, flops = sum(s for s, _ in runs), sum(f for _, f in runs)
            table_left = ""
            if waiting and flops:
                later = waiting_flops * seconds / flops / self.options.jobs
                table_left = f" · table {format_duration(max(left) + later)} left"
            line.show(" | ".join(f"{each.label} · {each.progress}" for each in running) + table_left)

        return show_progress

    def _run_through_launcher(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in two waves: first those without dependencies, then those that start from their weights."""
        launcher = str(self.options.launcher)
        for dependent in (False, True):
            wave: dict[str, list[Job]] = {}
            for job in jobs:
                if (job.entry.cell.weights_of is not None) == dependent:
                    wave.setdefault(job.entry.cell.name, []).append(job)
            processes = {}
            for name, seeds in wave.items():
                try:
                    for job in seeds:
                        job.prepare_folder()
                    folder = sweep_folder(seeds[0])
                    processes[name] = start_process(sweep_command(seeds, launcher, self.queue), folder)
                    self.console.print(f"{name}: {len(seeds)} runs, log {folder / LOG_NAME}")
                except UserError as error:
                    self.failures |= {job.name: str(error) for job in seeds}
            started = [job for seeds in wave.values() for job in seeds]
            with StatusLine(self.console) as line:
                wait_for_processes([*processes.values()], partial(_show_finished, line, started), interval_s=2.0)
            for name, process in processes.items():
                for job in wave[name]:
                    if not job.is_finished():
                        self.failures[job.name] = failure_reason(process.returncode, sweep_folder(job))
            self.report()

    def report(self) -> None:
        """Write the report of the chosen cells, and of others that have finished runs."""
        rows = []
        for entry in self.entries:
            jobs = [job for job in self.jobs if job.entry is entry]
            outcomes = tuple(read_outcome(job.folder, job.seed) for job in jobs if job.is_finished())
            if not outcomes and entry.cell.name not in self.names:
                continue
            failed = "; ".join(
                f"{job.name} failed: {self.failures[job.name]}" for job in jobs if job.name in self.failures
            )
            unfinished = (
                f"{len(jobs) - len(outcomes)} of {len(jobs)} runs not finished yet" if len(outcomes) < len(jobs) else ""
            )
            plan = outcomes[0].plan if outcomes else None
            flops = entry.flops(plan) if plan else 0.0
            rows.append(ReportRow(entry.cell, outcomes, flops, entry.skip_reason or failed or unfinished))
        results = Results(self.table, tuple(rows), self.command)
        figures = draw_results(results, self.folder)
        text = results.markdown([f"{name}.png" for name in figures])
        if self.table.figure == "budgets":
            text += "".join(f"{line}\n" for line in ["", *describe_times(results)])
        write_atomic(self.folder / "report.md", text.encode(errors="replace"))
        write_atomic(self.folder / "report.csv", results.csv().encode(errors="replace"))
        svg = [self.folder / f"{name}.svg" for name in figures]
        write_atomic(self.folder / "report.html", render_page(results, svg).encode(errors="replace"))


def _show_finished(line: StatusLine, jobs: Sequence[Job]) -> None:
    line.show(f"{sum((job.folder / 'report.json').exists() for job in jobs)} of {len(jobs)} runs done")


class StatusLine:
    """A status line that changes in place in a terminal, or is printed every `LOG_INTERVAL_S` in a log file."""

    def __init__(self, console: Console) -> None:
        self.console, self.last_line = console, time.monotonic()
        self.status = console.status("starting", refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> StatusLine:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def show(self, text: str) -> None:
        """Show the text, or print it if the last line is old enough."""
        if self.status:
            self.status.update(text)
        elif time.monotonic() - self.last_line >= LOG_INTERVAL_S:
            self.last_line = time.monotonic()
            self.console.print(text)
