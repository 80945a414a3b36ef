"""`mgvideo benchmark sampler`: the time in which a rank finds its clips of a step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.benchmark import conditions, output, plain_table, show
from mgvideo.cli.build import build_plan
from mgvideo.cli.schema import key
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.plan import Plan, require
from mgvideo.plan.schedules import make_plan


@dataclass
class Keys:
    """What this program takes besides the keys of a run."""

    ranks: list[int] = key([8, 128, 1024], "numbers of ranks")
    batch: int = key(4096, "global batch of the base grid, shared by each number of ranks")
    clips: int = key(512, "clips a rank has in the plan's first step, in rows whose global batch grows with the ranks")
    videos: int = key(240_000, "videos in the dataset")
    steps: int = key(100, "steps to measure in each row")
    format: str = key("table", "table or json")
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass(frozen=True)
class SamplerCost:
    """The cost of a rank's part of the plan's first slot, on the last rank."""

    ranks: int
    base_batch: int
    batch: int  # clips of the slot's global batch
    clips: int  # of them this rank's
    cpu_ms: float  # median of a step, of this thread


def read_keys(overrides: Sequence[str]) -> Keys:
    """Return this program's own keys. Raises UserError where a value makes no sense."""
    options = keys.read(Keys, overrides)
    require(options.format in ("table", "json"), f"format={options.format}: choose table or json")
    for name in ("batch", "clips", "videos", "steps"):
        require(getattr(options, name) >= 1, f"{name}={getattr(options, name)}: give a whole number from 1 up")
    valid = bool(options.ranks) and min(options.ranks) >= 1
    require(valid, f"ranks={options.ranks}: give whole numbers from 1 up")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure and report."""
    about = {**conditions(), "videos": options.videos, "steps": options.steps}
    costs = list(measure(options, cfg))
    with output(options.out) as file:
        if options.format == "json":
            print(json.dumps({"conditions": about, "rows": [asdict(cost) for cost in costs]}, indent=1), file=file)
        else:
            show(file, about, [table(costs)])


def measure(options: Keys, cfg: DictConfig) -> Iterator[SamplerCost]:
    """Yield a row for each number of ranks: at the same global batch, then at the same clips a rank."""
    plan, schedule = build_plan(cfg, options.videos), instantiate(cfg.schedule)
    multiplier = plan.phases[0].slots[0].batch // plan.base.batch_size
    same_batch = [(ranks, options.batch) for ranks in options.ranks]
    same_clips = [(ranks, max(1, options.clips * ranks // multiplier)) for ranks in options.ranks]
    for ranks, batch in [*same_batch, *same_clips]:
        yield cost(make_plan(replace(plan.base, batch_size=batch), schedule, options.videos), ranks, options.steps)


def cost(plan: Plan, ranks: int, steps: int) -> SamplerCost:
    """Measure the last rank, whose clips are the furthest into the batch."""
    sampler, phase = ClipSampler(plan, plan.dataset_size, seed=0), plan.phases[0]
    times, clips = [], 0
    for i in range(steps + 1):
        step = i * len(phase.slots) % phase.num_steps  # the first slot again and again
        start = time.thread_time()
        clips = len(sampler.shard(step, ranks - 1, ranks).clips)
        times.append(time.thread_time() - start)
    return SamplerCost(ranks, plan.base.batch_size, phase.slots[0].batch, clips, 1000 * median(times[1:]))


def table(costs: Sequence[SamplerCost]) -> Table:
    """A row for each number of ranks and batch."""
    shown = plain_table("a rank's part of a step", "ranks", "base batch", "clips of all", "clips of a rank", "CPU ms")
    for row in costs:
        shown.add_row(f"{row.ranks}", f"{row.base_batch:,}", f"{row.batch:,}", f"{row.clips}", f"{row.cpu_ms:.2f}")
    return shown
