"""A small but complete training set-up on real videos, for tests of the trainer and of the run program."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mgvideo import cli
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import Knobs, motion
from mgvideo.distributed.collectives import rank
from mgvideo.distributed.signals import STOP_SIGNALS
from mgvideo.engine.evaluation import Evaluator, Views
from mgvideo.engine.optimizers import sgd
from mgvideo.engine.precision import Normalize, choose_precision
from mgvideo.engine.tasks import SingleLabel
from mgvideo.engine.train_step import TrainStep
from mgvideo.engine.trainer import Trainer, TrainOptions
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.layers.dropout import convert_clip_dropout
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.loading.workers import start_fork_server
from mgvideo.models.small import r2plus1d_small
from mgvideo.plan import schedules
from mgvideo.plan.plan import Base, Plan
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint
from mgvideo.tracking.run_logger import RunLogger

if TYPE_CHECKING:
    from mgvideo.engine.augmentation import Augmentation

ROOT = Path(__file__).parents[1]
KNOBS = Knobs(train=64, val=12, frames=20, height=48, width=64)
# the same dataset with a small recipe, as overrides of the run program
TINY = [
    *(f"dataset.knobs.{name}={getattr(KNOBS, name)}" for name in ("train", "val", "frames", "height", "width")),
    "model=r2plus1d_small",
    "model.width=4",
    *(
        "base.num_frames=8",
        "base.crop_size=32",
        "base.short_side=[36,40]",
        "base.batch_size=8",
        "base.epochs=2",
        "base.lr=0.05",
    ),
    *("base.lr_milestones=[1]", "base.warmup_epochs=0", "schedule.min_size=16", "train.precise_bn_clips=16"),
    *("test.crop_size=32", "test.num_clips=1", "loader.num_workers=1", "train.log_every=2"),
    "loader.start_method=fork",  # workers need not import everything again
]
# modules that the fork server of `start_process` imports: the run program, and what training needs of torch
PRELOADED_MODULES = ("training", "mgvideo.cli.run", "mgvideo.models.r2plus1d", "torch._dynamo")
BASE = Base(
    batch_size=8, num_frames=8, crop_size=32, frame_stride=2, short_side=(36, 40), epochs=2, lr=0.05,
    lr_milestones=(1,), gamma=0.1, warmup_epochs=0, warmup_lr=0.0,
)  # fmt: skip


def tiny_plan(schedule: str = "multigrid", **base: object) -> Plan:
    """Make a plan of a few steps in several phases."""
    make_plan = getattr(schedules, schedule)
    return make_plan(replace(BASE, **base), KNOBS.train, round_epochs=False, min_size=16)  # type: ignore[arg-type]


def tiny_trainer(
    folder: Path,
    motion_root: str,
    plan: Plan,
    *,
    model: nn.Module | None = None,
    double: bool = False,
    workers: int = 0,
    seed: int = 0,
    validate: bool = False,
    build_optimizer: Callable[..., Optimizer] = sgd,
    augmentation: Augmentation | None = None,
    **options: float | str,
) -> Trainer:
    """Build a trainer of a small R(2+1)D, or of `model`, on the CPU; in float64 if `double`."""
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    model = model or r2plus1d_small(8, width=4, dropout=0.3)
    model = convert_clip_dropout(convert_group_batchnorm(model)).to(dtype)
    precision = choose_precision("fp32", torch.device("cpu"))
    normalize = Normalize((0.45,) * 3, (0.225,) * 3, dtype)
    loader_options = LoaderOptions(num_workers=workers)
    train, val = (Loader(motion(motion_root, KNOBS, split, PyAV()), loader_options) for split in ("train", "val"))
    views = Views.of_size(plan.base.num_frames, 2, plan.base.crop_size)
    step_options: dict[str, Any] = {"micro_batch_clips": 1000}
    step_options |= {
        key: options.pop(key)
        for key in ("micro_batch_clips", "compile", "hang_timeout", "clip_grad_norm", "ema")
        if key in options
    }
    settings = {"log_every": 2, "precise_bn_clips": 0, **options}
    optimizer = build_optimizer(model, plan.base.lr)
    return Trainer(
        TrainStep(
            model,
            plan,
            SingleLabel(),
            optimizer,
            seed=seed,
            normalize=normalize,
            precision=precision,
            augmentation=augmentation,
            **step_options,
        ),
        train,
        options=TrainOptions(**settings),  # type: ignore[arg-type]
        logger=RunLogger(folder, plan, active=rank() == 0),
        checkpoints=Checkpoints(folder / "checkpoints"),
        validate=(Evaluator(val, SingleLabel(), 8, normalize, precision), views) if validate else None,
    )


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    """Read one metric from metrics.jsonl, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(values)) == len(values), "a step is recorded twice"
    return dict(values)


def end_state(folder: Path) -> dict[str, object]:
    """Return the contents of a run's newest checkpoint that must not depend on interruptions; compare them by ==."""
    newest, warnings = Checkpoints(folder / "checkpoints").find_newest()
    assert newest is not None
    assert not warnings
    state = read_checkpoint(newest)
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    tensors = [*state["model"].values(), *state.get("model_ema", {}).values(), *moments]
    progress = {key: state["progress"][key] for key in ("step", "best", "evaluated", "clips", "bad")}
    return {**progress, "tensors": [tensor.numpy().tobytes() for tensor in tensors]}


def free_port() -> int:
    """Return a free TCP port, for the rendezvous of ranks."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different free TCP ports.

    They are below those that systems give to connections (from 32768 up), which could take a port before it is used.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        if len(ports) < count:
            with socket.socket() as listener, suppress(OSError):
                listener.bind(("localhost", port))
                ports.append(port)
    assert len(ports) == count, "a hundred ports have too few free ones"
    return ports


def run_program(
    *arguments: str, cwd: Path, processes: int = 0, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the run program in a folder.

    By default this happens in the current process, which has imported it. With `fresh` it runs in a new process, with
    `processes` in that many under torchrun.
    """
    if not fresh and not processes:
        return _run_in_this_process(arguments, cwd)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    if processes:
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launcher, str(ROOT / "tools" / "run_net.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def start_program(*arguments: str, log: Path, **options: Any) -> BaseProcess:
    """Start the run program with `start_process`, for runs that are killed or fail."""
    return start_process(cli.main, ["run", *arguments], log=log, **options)


def start_process(
    target: Callable, *arguments: object, log: Path, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Call a function in a new process, whose output goes to the file `log`.

    The process is forked from a server that has imported everything, which saves seconds. It does not run `atexit`
    handlers when it ends.
    """
    start_fork_server(PRELOADED_MODULES)
    variables = {**os.environ, **(environment or {})}
    call = (log, cwd or Path.cwd(), variables, target, arguments)
    process = multiprocessing.get_context("forkserver").Process(target=_call, args=call)
    process.start()
    return process


def _call(log: Path, cwd: Path, environment: dict[str, str], target: Callable, arguments: Sequence[object]) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the fork server blocks them
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    target(*arguments)


def _run_in_this_process(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    from mgvideo.cli.run import main  # here, because it takes a second and other users of this file do not need it

    code, out, err = 0, io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os.chdir(before)
        torch.use_deterministic_algorithms(False)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
