"""Results of a table: read from the folders of its runs, averaged over seeds, written as Markdown and CSV."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Plan
from mgvideo.storage.files import parse_json_lines

from .tables import Cell, Published, ResultTable

METRICS = {"top1": "top-1", "top5": "top-5", "map": "mAP"}


@dataclass(frozen=True)
class Outcome:
    """One finished run: its report.json, its plan, and a curve of (training seconds, validation metric)."""

    seed: int
    report: dict[str, Any]
    plan: Plan | None  # None if the run only tested weights
    curve: tuple[tuple[float, float], ...]
    jobs_at_once: int = 1  # runs of the table that shared the machine

    @property
    def trained(self) -> bool:
        """Whether the run trained; False if it only tested."""
        return self.report["train_seconds"] > 0


def read_outcome(folder: Path, seed: int) -> Outcome:
    """Read the outcome from a run's folder."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    plan_file = folder / "plan.json"
    plan = Plan.from_json(json.loads(plan_file.read_text(encoding="utf-8"))) if plan_file.exists() else None
    metric = f"val_{next(iter(report['metrics']), '')}"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = tuple((record["seconds"], record[metric]) for record in parse_json_lines(lines) if metric in record)
    cell_file = folder / "cell.json"
    cell = json.loads(cell_file.read_text(encoding="utf-8")) if cell_file.exists() else {}
    return Outcome(seed, report, plan, curve, cell.get("jobs_at_once", 1))


@dataclass(frozen=True)
class ReportRow:
    """A cell with the outcomes of its seeds. `status` is the reason for missing outcomes, empty if all are there."""

    cell: Cell
    outcomes: tuple[Outcome, ...] = ()
    flops: float = 0.0  # multiply-adds of all forward passes of its training
    status: str = ""

    @property
    def trained(self) -> bool:
        """Whether the cell has results and every run trained its network, rather than only testing weights."""
        return bool(self.outcomes) and all(outcome.trained for outcome in self.outcomes)

    @property
    def plan(self) -> Plan:
        """The plan, which all seeds share."""
        plan = self.outcomes[0].plan
        assert plan is not None, "only for cells that trained"
        return plan

    @property
    def schedule(self) -> str:
        """The name of the schedule; empty if the cell only tested weights."""
        plan = self.outcomes[0].plan
        return plan.schedule if plan else ""

    @property
    def seconds(self) -> float:
        """Mean training time, without evaluations."""
        return statistics.fmean(outcome.report["train_seconds"] for outcome in self.outcomes)

    @property
    def metric(self) -> str | None:
        """The main metric, which is the first in each report; None without outcomes."""
        return next(iter(self.outcomes[0].report["metrics"]), None) if self.outcomes else None

    def score(self, metric: str) -> tuple[float, float] | None:
        """Return mean and standard deviation over seeds (0 for one seed), None if the metric was not measured."""
        values = [o.report["metrics"][metric] for o in self.outcomes if metric in o.report["metrics"]]
        return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None

    @property
    def jobs_at_once(self) -> tuple[int, ...]:
        """The different numbers of runs that shared the machine, over the seeds."""
        return tuple(sorted({outcome.jobs_at_once for outcome in self.outcomes}))

    def shared(self, key: str) -> str:
        """Return the distinct values of a key in the reports of all seeds, joined by `; `."""
        return "; ".join(dict.fromkeys(str(outcome.report[key]) for outcome in self.outcomes))


@dataclass(frozen=True)
class Results:
    """A table's rows, in the table's order, and the command that produced them."""

    table: ResultTable
    rows: tuple[ReportRow, ...]
    command: str

    def savings(self, row: ReportRow) -> dict[str, float]:
        """Return how many times fewer steps and FLOPs, and how many times faster, than the baseline of the row.

        Keys are steps, FLOPs and clock. clock is only there if both ran on the same hardware, beside equally many other
        runs; without a trained baseline there are no keys.
        """
        baseline_cell = self.table.baseline_of(row.cell)
        baseline = next((other for other in self.rows if baseline_cell and other.cell.name == baseline_cell.name), None)
        if baseline is None or not baseline.trained or not row.trained:
            return {}
        savings = {"steps": baseline.plan.steps / row.plan.steps, "FLOPs": baseline.flops / row.flops}
        if baseline.shared("hardware") == row.shared("hardware") and baseline.jobs_at_once == row.jobs_at_once:
            savings["clock"] = baseline.seconds / row.seconds
        return savings

    def metrics(self) -> list[str]:
        """Return all metrics that some row measures."""
        measured = {m for row in self.rows for outcome in row.outcomes for m in outcome.report["metrics"]}
        return [metric for metric in METRICS if metric in measured]

    def grid(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings and the rows of cells, formatted as text."""
        metrics, has_rows = self.metrics(), any(row.cell.row for row in self.rows)
        has_published = any(row.cell.published for row in self.rows)
        several_machines = len(self.hardware()) > 1
        headings = [*(["row"] if has_rows else []), "cell", *(f"{METRICS[m]}, %" for m in metrics), "seeds"]
        headings += ["epochs", "steps", "training", *(["on"] if several_machines else [])]
        headings += ["fewer steps", "fewer FLOPs", "faster", *(["published"] if has_published else [])]
        rows = []
        for row in self.rows:
            scores = [_score(row, metric) for metric in metrics]
            cells = [*([row.cell.row] if has_rows else []), row.cell.column or row.cell.name, *scores]
            cells += [str(len(row.outcomes)), *_training(row), *([row.shared("hardware")] if several_machines else [])]
            savings = self.savings(row)
            cells += [f"{savings[key]:.2f}×" if key in savings else "–" for key in ("steps", "FLOPs", "clock")]
            rows.append([*cells, *([_published(row.cell.published)] if has_published else [])])
        return headings, rows

    def hardware(self) -> list[str]:
        """Return the distinct hardware of all runs."""
        return list(dict.fromkeys(str(o.report["hardware"]) for row in self.rows for o in row.outcomes))

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield (name, value) pairs that describe the table: data, hardware, software, dates."""
        yield "mirrors", self.table.mirrors
        yield "data", self.table.preset.about
        outcomes = [outcome for row in self.rows for outcome in row.outcomes]
        for name in ("hardware", "precision", "torch"):
            values = "; ".join(dict.fromkeys(str(outcome.report[name]) for outcome in outcomes))
            if values:
                yield name, values
        if outcomes:
            days = sorted(outcome.report["date"][:10] for outcome in outcomes)
            yield "measured", days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
            first = outcomes[0].report
            yield "test", f"{first['videos']} held-out videos, {first['views']} views each"
            yield "training in all", format_duration(sum(outcome.report["train_seconds"] for outcome in outcomes))

    def notes(self) -> Iterator[str]:
        """Yield notes on missing results, on how to read the table, and on unreadable videos."""
        for row in self.rows:
            if row.status:
                yield f"{row.cell.title}: {row.status}"
        if any(row.trained for row in self.rows):
            yield (
                "± is the standard deviation over seeds; training is the mean time without evaluations; fewer and "
                f"faster are against {self.table.baseline}; FLOPs are those of all training clips"
            )
        at_once = max((n for row in self.rows for n in row.jobs_at_once), default=1)
        if at_once > 1:
            yield f"up to {at_once} runs shared the machine: each took longer than it would alone"
        bad_videos = sum(outcome.report["bad_videos"] for row in self.rows for outcome in row.outcomes)
        if bad_videos:
            yield f"{bad_videos} tested videos could not be read and count as wrong"

    def markdown(self, figures: list[str]) -> str:
        """Return report.md, with links to figures in the same folder."""
        headings, rows = self.grid()
        lines = [f"# {self.table.title}", "", *([self.table.about, ""] if self.table.about else [])]
        lines += [f"- {name}: {value}" for name, value in self.facts()]
        lines += ["", f"    {self.command}", "", f"| {' | '.join(headings)} |"]
        text_columns = {"row", "cell", "on", "published"}
        lines += ["| " + " | ".join("---" if heading in text_columns else "---:" for heading in headings) + " |"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        lines += ["", *(f"- {note}" for note in self.notes())]
        for figure in figures:
            lines += ["", f"![{self.table.title}]({figure})"]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return report.csv: one line a cell, with unformatted numbers."""
        text = StringIO(newline="")
        metrics = self.metrics()
        names = ["table", "preset", "cell", "row", "column", "seeds"]
        names += [f"{metric}_{part}" for metric in metrics for part in ("mean", "std")]
        names += ["epochs", "steps", "train_seconds", "forward_pflops", "fewer_steps", "fewer_flops", "faster"]
        names += ["hardware", "precision", "torch", "published", "published_by", "status"]
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        for row in self.rows:
            writer.writerow(self._csv_row(row, metrics))
        return text.getvalue()

    def _csv_row(self, row: ReportRow, metrics: list[str]) -> dict[str, Any]:
        """Return a row's values by the columns of report.csv."""
        cell, savings = row.cell, self.savings(row)
        line: dict[str, Any] = {"table": self.table.name, "preset": self.table.preset.name, "cell": cell.name}
        line |= {"row": cell.row, "column": cell.column or cell.name, "status": row.status}
        line["seeds"] = " ".join(str(outcome.seed) for outcome in row.outcomes)
        for metric in metrics:
            score = row.score(metric)
            if score:
                line[f"{metric}_mean"], line[f"{metric}_std"] = (round(value, 4) for value in score)
        if row.trained:
            line |= {"epochs": row.plan.epochs, "steps": row.plan.steps, "train_seconds": round(row.seconds, 2)}
            line["forward_pflops"] = row.flops / 1e15
        for key, name in (("steps", "fewer_steps"), ("FLOPs", "fewer_flops"), ("clock", "faster")):
            line[name] = round(savings[key], 4) if key in savings else None
        line |= {key: row.shared(key) for key in ("hardware", "precision", "torch")}
        if cell.published:
            line["published"] = " ".join(f"{key}={value}" for key, value in cell.published.metrics.items())
            line["published_by"] = cell.published.source
        return line


def _score(row: ReportRow, metric: str) -> str:
    """Return a metric as text, with its deviation if there are several seeds."""
    score = row.score(metric)
    if score is None:
        return "–"
    return f"{score[0]:.2f}" + (f" ± {score[1]:.2f}" if len(row.outcomes) > 1 else "")


def _training(row: ReportRow) -> list[str]:
    """Return epochs, steps and training time as text."""
    if not row.trained:
        return ["–", "–", "–"]
    return [f"{row.plan.epochs:g}", f"{row.plan.steps:,}", format_duration(row.seconds)]


def _published(published: Published | None) -> str:
    """Return published results as text, with their setting and source."""
    if published is None:
        return "–"
    figures = " / ".join(f"{value:g}" for value in published.metrics.values())
    text = ", ".join(part for part in (figures, published.setting) if part)
    return f"{text} ({published.source})"
