"""`mgvideo benchmark sampler`: the time in which a rank computes its clips of a step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.benchmark import ResultLog, measurement_conditions, open_report, plain_table, print_report
from mgvideo.cli.build import build_plan, build_schedule
from mgvideo.cli.schema import key
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.plan import Plan, require


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    ranks: list[int] = key([8, 128, 1024], "numbers of ranks")
    batch: int = key(4096, "global batch of the base grid, the same for each number of ranks", least=1)
    clips: int = key(
        512, "clips of a rank in the plan's first step, in the rows whose global batch grows with the ranks", least=1
    )
    videos: int = key(240_000, "videos in the dataset", least=1)
    steps: int = key(100, "steps to measure in each row", least=1)
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass(frozen=True)
class SamplerCost:
    """CPU time of the last rank for its clips of a step of the plan's first slot."""

    ranks: int
    base_batch: int
    batch: int  # clips of the slot's global batch
    clips: int  # of this rank
    cpu_ms: float  # median over steps, of this thread


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    valid = bool(options.ranks) and min(options.ranks) >= 1
    require(valid, f"ranks={options.ranks}: give whole numbers from 1 up")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure all rows and print the report."""
    conditions = {**measurement_conditions(), "videos": options.videos, "steps": options.steps}
    costs = []
    with ResultLog(2 * len(options.ranks), options.out) as log:
        for row in measure(options, cfg):
            costs.append(row)
            log(f"{row.ranks} ranks, {row.clips} clips of {row.batch:,}: {row.cpu_ms:.2f} ms")
        with open_report(options.out) as file:
            if options.format == "json":
                print(
                    json.dumps({"conditions": conditions, "rows": [asdict(row) for row in costs]}, indent=1), file=file
                )
            else:
                print_report(file, conditions, [table(costs)])


def measure(options: Keys, cfg: DictConfig) -> Iterator[SamplerCost]:
    """Yield a row for each number of ranks: at the same global batch, then at the same clips per rank."""
    plan, schedule = build_plan(cfg, options.videos), build_schedule(cfg)
    multiplier = plan.phases[0].slots[0].batch // plan.base.batch_size
    same_batch = [(ranks, options.batch) for ranks in options.ranks]
    same_clips = [(ranks, max(1, options.clips * ranks // multiplier)) for ranks in options.ranks]
    for ranks, batch in [*same_batch, *same_clips]:
        yield cost(schedule(replace(plan.base, batch_size=batch), options.videos), ranks, options.steps)


def cost(plan: Plan, ranks: int, steps: int) -> SamplerCost:
    """Measure the last rank, whose clips are at the end of the global batch."""
    sampler, phase = ClipSampler(plan, plan.dataset_size, seed=0), plan.phases[0]
    times, clips = [], 0
    for i in range(steps + 1):
        step = i * len(phase.slots) % phase.num_steps  # always the first slot
        start = time.thread_time()
        clips = len(sampler.shard(step, ranks - 1, ranks).clips)
        times.append(time.thread_time() - start)
    return SamplerCost(ranks, plan.base.batch_size, phase.slots[0].batch, clips, 1000 * median(times[1:]))


def table(costs: Sequence[SamplerCost]) -> Table:
    """Return a table with a row for each number of ranks and batch."""
    report = plain_table(
        "clips of one rank in a step", "ranks", "base batch", "global clips", "clips of a rank", "CPU ms"
    )
    for row in costs:
        report.add_row(f"{row.ranks}", f"{row.base_batch:,}", f"{row.batch:,}", f"{row.clips}", f"{row.cpu_ms:.2f}")
    return report
