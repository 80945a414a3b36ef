"""Options that every schedule has: a compute or time budget, measured batches, a finish, the strength of augmentation.

`ScheduleOptions.apply` turns a schedule into a schedule with these options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mgvideo.errors import UserError

from .drafts import append_phase
from .forecast import Benchmark, clip_pixels, predict_phase_times, read_benchmark, total_cost
from .formatting import format_duration
from .plan import Base, Grid, Plan, Slot, finite_or_nan, require
from .schedules import Schedule, baseline, baseline_of

STRENGTHS = ("constant", "volume")
FINISHES = ("head", "all")
BATCHES = ("volume", "measured")
MAX_EPOCH_FACTOR = 64.0  # a budget that would allow more is an error: the search ends somewhere


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of a schedule, `schedule.*` of a config. `configs/schedule_common.yaml` documents them.

    Raises:
        UserError: a value is invalid, or values do not fit together. The message names the key to change.
    """

    strength: str = "constant"
    finish: str | None = None
    finish_epochs: float = 1.0
    finish_lr: float = 0.01  # relative to the base LR
    finish_size: int | None = None  # crop size, pixels; None: that of the base
    budget: float | None = None  # cost of the run as a fraction of the baseline's
    hours: float | None = None
    benchmark: str | None = None  # path of a benchmark file, see `read_benchmark`
    batches: str = "volume"
    gpus: int | None = None  # that `hours` are counted on; None: 1

    def __post_init__(self) -> None:
        for key, choices in (("strength", STRENGTHS), ("finish", (None, *FINISHES)), ("batches", BATCHES)):
            value = getattr(self, key)
            names = ", ".join("null" if choice is None else choice for choice in choices)
            require(value in choices, f"schedule.{key}={value}: choose one of {names}")
        for key in ("finish_epochs", "finish_lr", "budget", "hours", "finish_size", "gpus"):
            value = getattr(self, key)
            require(value is None or finite_or_nan(value) > 0, f"schedule.{key}={value}: give a number above 0")
        require(self.budget is None or self.hours is None, "give schedule.budget or schedule.hours, not both")
        for key, needed in (("hours", self.hours is not None), ("batches", self.batches == "measured")):
            no_file = f"schedule.{key}={getattr(self, key)}: add schedule.benchmark=FILE with measured step times"
            require(
                not needed or self.benchmark is not None, f"{no_file} (tools/benchmark.py step format=json out=FILE)"
            )

    def apply(self, schedule: Schedule) -> Schedule:
        """Return the schedule with these options. Without any it is `schedule` itself, or makes equal plans."""
        return partial(_make_plan, schedule, self)


def _make_plan(schedule: Schedule, options: ScheduleOptions, base: Base, dataset_size: int) -> Plan:
    benchmark = read_benchmark(options.benchmark) if options.benchmark is not None else None
    if options.batches == "measured" and benchmark:
        base = replace(base, batch_multipliers=measured_multipliers(base, benchmark))

    def make(make_plan: Schedule) -> Plan:
        return _with_strength(_with_finish(make_plan(base, dataset_size), options), options.strength)

    if options.budget is None and options.hours is None:
        return make(schedule)
    accepted = inspect.signature(getattr(schedule, "func", schedule)).parameters
    key = "budget" if options.budget is not None else "hours"
    no_factor = f"schedule.{key}: this schedule has no key epoch_factor, which {key} would set"
    require("epoch_factor" in accepted, no_factor)
    longer: Callable[..., Plan] = schedule
    return _fit(lambda factor: make(partial(longer, epoch_factor=factor)), base, dataset_size, options, benchmark)


def measured_multipliers(base: Base, benchmark: Benchmark) -> tuple[tuple[str, int], ...]:
    """Return the batch multiplier of each measured grid: how many of its clips take the time of a clip of the base.

    Where the benchmark has no `step_clips`, its steps have batches by volume. Steps that do not fit into memory run in
    micro-batches, as with any batch.

    Raises:
        UserError: the base's grid was not measured, or a name of a grid is not like 8x112.
    """
    base_name, base_volume = f"{base.num_frames}x{base.crop_size}", base.num_frames * base.crop_size**2
    clip_seconds = {}
    for name, seconds in benchmark.step_seconds.items():
        frames, _, size = name.partition("x")
        valid = frames.isdecimal() and size.isdecimal() and int(frames) * int(size) > 0
        require(valid, f"{benchmark.source}: {name} is no grid: name it by frames and crop size, such as 8x112")
        clips = benchmark.step_clips.get(name, base.batch_size * base_volume / (int(frames) * int(size) ** 2))
        clip_seconds[name] = seconds / clips
    missing = f"{benchmark.source}: step_seconds has no grid {base_name}, that of the recipe: measure it too"
    require(base_name in clip_seconds, missing)
    return tuple((name, max(1, round(clip_seconds[base_name] / s))) for name, s in clip_seconds.items())


def _with_strength(plan: Plan, strength: str) -> Plan:
    """Return the plan with the strength of augmentation and drop path in its slots.

    `volume`: the square root of the clip's volume relative to the base's, at most 1. So the coarsest grid of the long
    cycle has 0.35 of the full strength (compare EfficientNetV2, arXiv 2104.00298, table 6: a third).
    """
    if strength == "constant":
        return plan
    base_volume = plan.base.num_frames * plan.base.crop_size**2

    def scaled(slot: Slot) -> Slot:
        return replace(slot, strength=round(min(1.0, math.sqrt(slot.grid.volume / base_volume)), 4))

    phases = [replace(phase, slots=tuple(map(scaled, phase.slots))) for phase in plan.phases]
    return replace(plan, phases=tuple(phases))


def _with_finish(plan: Plan, options: ScheduleOptions) -> Plan:
    """Return the plan with a short last phase at the test grid (Touvron et al., arXiv 1906.06423).

    Clips have the short side of the test, without jitter, and the base's stride. Their batch keeps the base's volume,
    in halves or multiples of the base's batch. The LR falls linearly from `finish_lr` to 0.
    """
    if options.finish is None:
        return plan
    base, size = plan.base, options.finish_size or plan.base.crop_size
    grid = Grid(base.num_frames, size, (base.frame_stride, base.frame_stride), (size, size))
    ratio = base.crop_size**2 / size**2
    batch = base.batch_size * round(ratio) if ratio > 0.7 else max(1, base.batch_size // round(1 / ratio))
    steps = max(1, round(options.finish_epochs * plan.dataset_size / batch))
    last = plan.phases[-1]
    bn_group = last.batch // last.bn_groups
    plan = append_phase(plan, len(base.lr_bounds) - 1, (Slot(grid, batch),), options.finish_lr, steps, bn_group)
    return replace(plan, phases=(*plan.phases[:-1], replace(plan.phases[-1], trains=options.finish)))


def statistics_plan(plan: Plan) -> Plan:
    """Return the plan of the batches for precise BN: the baseline, or one epoch of the finish if the plan has one."""
    last = plan.phases[-1]
    if last.stage < len(plan.base.lr_bounds) - 1:
        return baseline_of(plan)
    steps = max(1, plan.dataset_size // last.batch)
    return replace(plan, phases=(replace(last, steps=(0, steps), epochs=(0.0, 1.0)),))


def _fit(
    make: Callable[[float], Plan], base: Base, dataset_size: int, options: ScheduleOptions, benchmark: Benchmark | None
) -> Plan:
    """Return the plan with the largest epoch factor whose cost is within the budget, and a note about it.

    The cost is the predicted time if there is a benchmark, else the number of pixels.

    Raises:
        UserError: no epoch factor fits.
    """
    gpus = options.gpus or 1

    def cost(plan: Plan) -> float:
        if benchmark is None:
            return total_cost(plan.phases, clip_pixels)
        return sum(time.seconds for time in predict_phase_times(plan, gpus, benchmark))

    if options.budget is not None:
        whole, setting = cost(baseline(base, dataset_size, min_size=1)), f"schedule.budget={options.budget:g}"
        limit = options.budget * whole
    else:
        limit, setting = 3600 * float(options.hours or 0), f"schedule.hours={options.hours:g}"
    search = _BudgetSearch(make, cost, limit)
    found = search.run()
    if found is None:
        raise UserError(f"{setting}: {search.refusal(benchmark is not None)}")
    factor, plan = found
    if options.budget is not None:
        kind = "pixels" if benchmark is None else "predicted time"
        text = f"epoch_factor={factor:.4g} gives the run {cost(plan) / whole:.3g} of the baseline's {kind}"
    else:
        where = f"{gpus} GPU{'s' * (gpus > 1)}"
        text = f"epoch_factor={factor:.4g} takes {format_duration(cost(plan))} of training on {where}, as predicted"
    return replace(plan, notes=(f"{setting}: {text}", *plan.notes))


class _BudgetSearch:
    """Search for the largest epoch factor whose plan costs at most `limit`.

    The cost grows with the factor, but for the rounding of epochs and steps.
    """

    def __init__(self, make: Callable[[float], Plan], cost: Callable[[Plan], float], limit: float) -> None:
        self.make, self.cost, self.limit = make, cost, limit
        self.best: tuple[float, Plan] | None = None
        self.cheapest = math.inf  # cost of the cheapest plan seen
        self.problem = ""  # why the last plan could not be made

    def run(self) -> tuple[float, Plan] | None:
        """Return the factor and its plan, or None if none fits."""
        low, high = 0.0, 1.0
        while not self._is_too_expensive(high):
            low, high = high, 2 * high
            if high > MAX_EPOCH_FACTOR:
                return None
        for _ in range(14):  # to 1/16,384
            middle = (low + high) / 2
            low, high = (low, middle) if self._is_too_expensive(middle) else (middle, high)
        return self.best

    def _is_too_expensive(self, factor: float) -> bool:
        """Try a factor. A plan that cannot be made, because the run is too short for it, is not too expensive."""
        try:
            plan = self.make(factor)
        except UserError as error:
            self.problem = str(error)
            return False
        plan_cost = self.cost(plan)
        self.cheapest = min(self.cheapest, plan_cost)
        if plan_cost <= self.limit and (self.best is None or factor > self.best[0]):
            self.best = (factor, plan)
        return plan_cost > self.limit

    def refusal(self, is_time: bool) -> str:
        """Return why no factor fits."""
        if self.cheapest == math.inf:
            return self.problem
        if self.best is not None:
            return f"it allows more than {MAX_EPOCH_FACTOR:g} times the recipe's epochs: lower it"
        least = format_duration(self.cheapest) if is_time else f"{self.cheapest / self.limit:.3g} times as much"
        reason = f" ({self.problem})" if self.problem else ""
        return f"no run is that short: raise it, as the shortest of this recipe takes {least}{reason}"
