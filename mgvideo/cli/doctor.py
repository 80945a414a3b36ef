"""`mgvideo doctor`: check this machine before training and print one table, ready to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import av
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from mgvideo import __version__
from mgvideo.cpu.resources import available_cpus, cpu_count, find_resources
from mgvideo.datasets.decoders import Decoder, Decord, PyAV, TorchCodec
from mgvideo.datasets.motion import Knobs, make_motion, motion
from mgvideo.engine.optimizers import sgd
from mgvideo.engine.precision import Precision, choose_precision, cudnn_warning, probe_convolutions
from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.loading.loader import Loader
from mgvideo.loading.sampler import ClipSampler
from mgvideo.loading.shared_memory import get_shared_memory_space
from mgvideo.plan.formatting import format_memory
from mgvideo.plan.plan import Plan
from mgvideo.plan.table import set_full_width

from . import app, keys
from .build import build_normalize, build_plan, loader_options
from .schema import key

PACKAGES = ("torchvision", "torchmetrics", "hydra-core", "omegaconf", "iopath", "av", "decord", "torchcodec")
NETWORKS = ("slowfast_small", "i3d_small", "i3d_nln_small", "r2plus1d_small")  # of configs/model
MIN_OPEN_FILES = 4096  # loader workers, checkpoints and sockets may need as many; 1,024 is a common limit
MIN_DISK_BYTES = 10e9  # with less free space, checkpoints and decoded frames may not fit
MOTION_KNOBS = Knobs(train=32, val=4)  # the dataset that the decoder and loader checks generate
LOADER_MEASUREMENT_S = 3.0


@dataclass
class DoctorKeys:
    """Keys of this program, besides the keys of a run."""

    format: str = key("table", "table or json", choices=("table", "json"))


@dataclass(frozen=True)
class CheckResult:
    """A row of the table: the check, its status (`ok`, `warning` or `failure`), what it found, and what to do."""

    check: str
    status: str
    found: str
    remedy: str = ""


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo doctor` and tools/doctor.py."""
    own_overrides, run_overrides = keys.split(DoctorKeys, arguments)
    with app.exit_on_user_error():
        options = keys.read(DoctorKeys, own_overrides)
    intro = "Check this machine before training. Exit code 1 if a check fails. Takes the keys of a run, and:"
    text = "\n".join([intro, "", *keys.describe(DoctorKeys)])
    app.main("run", text, partial(run, options), run_overrides, keys.names(DoctorKeys))


def run(options: DoctorKeys, cfg: DictConfig) -> None:
    """Run every check, print the table, and exit with 1 if a check fails."""
    with tempfile.TemporaryDirectory() as folder:
        results = list(run_checks(cfg, Path(folder)))
    if options.format == "json":
        print(json.dumps([asdict(result) for result in results], indent=1, ensure_ascii=False))
    else:
        console, table = Console(soft_wrap=True, highlight=False), results_table(results)
        console.print(table if console.is_terminal else set_full_width(table))
    if any(result.status == "failure" for result in results):
        raise SystemExit(1)


def results_table(results: Sequence[CheckResult]) -> Table:
    """Return a table with one row for each result."""
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for result in results:
        table.add_row(result.check, result.status, result.found, result.remedy)
    return table


def run_checks(cfg: DictConfig, folder: Path) -> Iterator[CheckResult]:
    """Yield the results of all checks. An exception becomes a failure of that check, and the others still run."""
    machine = Machine(cfg, folder)
    for name, check in CHECKS.items():
        print(f"checking {name} …", file=sys.stderr, flush=True)
        try:
            yield from check(machine)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            remedy = "" if isinstance(error, UserError) else "report this line as a bug"
            yield CheckResult(
                name, "failure", line if isinstance(error, UserError) else f"{type(error).__name__}: {line}", remedy
            )


@dataclass
class Machine:
    """What the checks share: the config of a run, a temporary folder, and objects built from both on first use."""

    cfg: DictConfig
    folder: Path

    @cached_property
    def device(self) -> torch.device:
        """The device that a run of one process uses."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def precision(self) -> Precision:
        """The precision that a run chooses."""
        return choose_precision(self.cfg.precision, self.device)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the config for the small generated dataset."""
        return build_plan(self.cfg, max(MOTION_KNOBS.train, self.cfg.base.batch_size or 0))

    @cached_property
    def videos(self) -> Any:
        """A dataset of real mp4 files, generated in the temporary folder."""
        make_motion(str(self.folder), MOTION_KNOBS)
        return motion(str(self.folder), MOTION_KNOBS, "train", PyAV())


def check_versions(machine: Machine) -> Iterator[CheckResult]:
    """Report the versions of Python, the operating system and the packages that matter."""
    del machine
    yield CheckResult("system", "ok", f"Python {platform.python_version()} on {platform.platform()}")
    yield CheckResult(
        "mgvideo, torch", "ok", f"mgvideo {__version__}, torch {torch.__version__} (CUDA {torch.version.cuda})"
    )
    installed, missing = [], []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    yield CheckResult("packages", "ok", f"{', '.join(installed)}{absent}")


def check_gpus(machine: Machine) -> Iterator[CheckResult]:
    """Check GPUs, cuDNN and NCCL. A GPU that the driver lists and torch does not see is a failure."""
    if not torch.cuda.is_available():
        listed = _nvidia_gpus()
        if listed:
            yield CheckResult(
                "GPU", "failure", f"torch does not see {listed}", "install a CUDA build of torch, or a newer driver"
            )
        else:
            yield CheckResult("GPU", "ok", "none: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.8 * total
        memory = f"{format_memory(free)} of {format_memory(total)} free"
        text = f"{properties.name}, capability {properties.major}.{properties.minor}, {memory}"
        remedy = "another program uses its memory: stop it, or set CUDA_VISIBLE_DEVICES" if busy else ""
        yield CheckResult(f"GPU {index}", "warning" if busy else "ok", text, remedy)
    warning = cudnn_warning(machine.precision)
    version = torch.backends.cudnn.version()
    yield CheckResult("cuDNN", "warning" if warning else "ok", str(version), warning or "")
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if nccl:
        yield CheckResult("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield CheckResult("NCCL", "failure", "not in this torch", "install a torch with NCCL to train on several GPUs")


def _nvidia_gpus() -> str:
    """Return the first line of `nvidia-smi -L`, or an empty string if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, encoding="utf-8", errors="replace")
    return listed.stdout.partition("\n")[0] if listed.returncode == 0 else ""


def check_precision(machine: Machine) -> Iterator[CheckResult]:
    """Check that convolutions are correct and fast in the precision that a run chooses."""
    chosen = machine.precision
    yield CheckResult("precision", "ok", str(chosen))
    model = chosen.place(_model("slowfast_small"))
    grids = [slot.grid for phase in machine.plan.phases for slot in phase.slots]
    faults = probe_convolutions(model, grids, chosen)
    for fault in faults.wrong:
        yield CheckResult(
            "kernels", "warning", fault, "precision=auto falls back to fp32; or install another version of torch"
        )
    for fault in faults.slow:
        yield CheckResult("kernels", "warning", fault, "try precision=fp32, or install another version of torch")
    if not (faults.wrong or faults.slow):
        compared = "nothing to compare in fp32" if chosen.dtype is None else f"correct in {chosen.name}"
        yield CheckResult("kernels", "ok", f"convolutions: {compared}")


def check_decoders(machine: Machine) -> Iterator[CheckResult]:
    """Check that each decoder returns the same frames of a real file as PyAV."""
    versions = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    libraries = f"libavcodec {versions['libavcodec']}, libavformat {versions['libavformat']}"
    path, reference = machine.videos.path(0), None
    for name, make in (("pyav", PyAV), ("decord", Decord), ("torchcodec", TorchCodec)):
        try:
            frames = _middle_frames(make(), path)
        except UserError as error:
            yield CheckResult(
                f"decoder {name}", "failure" if name == "pyav" else "warning", "does not work", str(error)
            )
            continue
        reference = frames if reference is None else reference
        same = (frames.float() - reference.float()).abs().mean() < 2  # decoders round colours differently
        text = f"reads H.264{f'; {libraries}' if name == 'pyav' else ''}" if same else "returns other frames than PyAV"
        yield CheckResult(f"decoder {name}", "ok" if same else "failure", text, "" if same else "use decoder=pyav")


def _middle_frames(decoder: Decoder, path: str) -> Tensor:
    import numpy as np

    from mgvideo.datasets.videofile import Box

    with decoder.open(path) as video:
        return video.read(np.array([20, 22, 24]), Box(0, 0, video.height, video.width))


def check_cpus(machine: Machine) -> Iterator[CheckResult]:
    """Check the CPU cores and memory that this process may use, and the loader workers that run on them."""
    resources = find_resources()
    limits = [f"a quota of {float(limit):g} cores" for limit in resources.cpu_limits.values()]
    text = ", ".join([f"{cpu_count()} usable, of {len(available_cpus())} in the CPU affinity of this process", *limits])
    options = loader_options(machine.cfg)
    few = machine.device.type == "cuda" and options.num_workers < 4
    remedy = "give each GPU 8 or more cores (SLURM: --cpus-per-task), or prepare a pyramid" if few else ""
    yield CheckResult("CPU cores", "warning" if few else "ok", f"{text}; {options.num_workers} loader workers", remedy)
    memory = min([resources.memory, *resources.memory_limits.values()])
    small = memory < 4 * 2**30
    yield CheckResult(
        "memory", "warning" if small else "ok", f"{format_memory(memory)} available", "4 GiB or more" if small else ""
    )


def check_shared_memory(machine: Machine) -> Iterator[CheckResult]:
    """Check the free space in /dev/shm, through which loader workers send batches."""
    del machine
    room = get_shared_memory_space()
    if room is None:
        yield CheckResult("/dev/shm", "ok", "no limit on this system")
        return
    small = room.free < 2**30
    text = f"{format_memory(room.free)} free"
    remedy = "in Docker: docker run --shm-size=8g; otherwise lower loader.num_workers" if small else ""
    yield CheckResult("/dev/shm", "warning" if small else "ok", text, remedy)


def check_open_files(machine: Machine) -> Iterator[CheckResult]:
    """Check the limit on open files and sockets of a process."""
    del machine
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES
    yield CheckResult("open files", "warning" if few else "ok", f"at most {limit}", "ulimit -n 65536" if few else "")


def check_disk(machine: Machine) -> Iterator[CheckResult]:
    """Check free space and write permission where the run's folder will be."""
    from mgvideo.storage.paths import is_remote

    target = str(machine.cfg.output_dir)
    if is_remote(target):
        yield CheckResult("disk", "ok", f"{target} is remote: not checked")
        return
    parent = next(p for p in (Path(target).absolute(), *Path(target).absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    little = free < MIN_DISK_BYTES
    yield CheckResult(
        "disk", "warning" if little else "ok", f"{decimal(free)} free in {parent}", "set output_dir" if little else ""
    )
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        yield CheckResult("disk", "failure", f"cannot write in {parent}: {error.strerror}", "set output_dir")


def _model(name: str) -> nn.Module:
    composed = app.compose_config("run", [f"model={name}", "dataset.num_classes=8"])
    return convert_group_batchnorm(instantiate(composed.model))


def check_networks(machine: Machine) -> Iterator[CheckResult]:
    """Check that loss and weights stay finite in training steps of a small network of each family."""
    for name in NETWORKS:
        step = _SmallTraining(machine, name)
        finite = step(4, 8, 64)
        text = f"a training step of 4 clips of 8×64²: {1e3 * step.seconds:.0f} ms"
        if finite:
            yield CheckResult(name, "ok", text)
        else:
            yield CheckResult(name, "failure", "loss or weights are not finite", "try precision=fp32")


class _SmallTraining:
    """Training steps of a small network, without the trainer. `seconds` is the time of the last step."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.precision, self.device = machine.precision, machine.device
        self.model = self.precision.place(_model(name)).train()
        self.normalize = build_normalize(machine.cfg, self.precision)
        self.optimizer = sgd(self.model, 1e-3)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.dtype is torch.float16)
        self.seconds = 0.0

    def __call__(self, clips: int, frames: int, size: int, groups: int = 1) -> bool:
        """Take two steps on random pixels and time the second. Returns whether loss and weights are finite."""
        pixels = torch.randint(0, 256, (clips, frames, size, size, 3), dtype=torch.uint8).to(self.device)
        labels = torch.arange(clips, device=self.device) % 8
        set_bn_groups(self.model, groups)
        loss = torch.zeros(())
        for _ in range(2):
            started = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            with deferred_running_stats(self.model), self.precision.autocast():
                logits = self.model(self.normalize(pixels))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())  # also synchronises the device
            self.seconds = time.perf_counter() - started
        return finite and bool(torch.isfinite(loss))


def check_loader_speed(machine: Machine) -> Iterator[CheckResult]:
    """Compare clips per second of the loader, on a small real dataset, and of the training step, on the base grid."""
    base, batch = machine.plan.base, machine.plan.base.batch_size
    step = _SmallTraining(machine, "slowfast_small")
    step(batch, base.num_frames, base.crop_size)
    trained, loaded = batch / step.seconds, _loader_rate(machine)
    slow = loaded < trained
    grid = f"{base.num_frames}×{base.crop_size}²"
    text = f"{loaded:.0f} clips per second loaded, {trained:.0f} trained (slowfast_small, {grid})"
    remedy = (
        "the loader is the bottleneck: use more cores, dataset.frame_cache or a pyramid; see benchmark loader"
        if slow
        else ""
    )
    yield CheckResult("loader and step", "warning" if slow else "ok", text, remedy)


def _loader_rate(machine: Machine) -> float:
    from mgvideo.plan.schedules import baseline_of

    plan = baseline_of(machine.plan)
    sampler = ClipSampler(plan, len(machine.videos), seed=0)
    loader = Loader(machine.videos, loader_options(machine.cfg))
    with ExitStack() as stack:
        batches = loader.load_steps(partial(sampler.shard, rank=0, world_size=1), range(plan.steps))
        stack.callback(getattr(batches, "close", lambda: None))
        next(batches)  # starts the workers
        clips, started = 0, time.perf_counter()
        for batch in batches:
            clips += len(batch.labels)
            if time.perf_counter() - started > LOADER_MEASUREMENT_S:
                break
        return clips / (time.perf_counter() - started)


CHECKS: dict[str, Callable[[Machine], Iterator[CheckResult]]] = {
    "versions": check_versions,
    "GPU": check_gpus,
    "precision": check_precision,
    "decoders": check_decoders,
    "CPU cores": check_cpus,
    "shared memory": check_shared_memory,
    "open files": check_open_files,
    "disk": check_disk,
    "networks": check_networks,
    "loader and step": check_loader_speed,
}
