"""`mgvideo benchmark gpu`: check and measure everything on one GPU in one call of under ten minutes.

Each section runs in its own process with a time limit, the most important first. Each writes its own results, so
a crash or timeout affects one section only. Without a GPU, the sections run in small sizes on the CPU, as a rehearsal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from mgvideo.cli.benchmark import measurement_conditions
from mgvideo.cli.schema import key
from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.models.pooling import max_pool
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import require
from mgvideo.storage.paths import explain_write_errors

ROOT = Path(__file__).parents[3]  # the checkout, which contains tests/
KINETICS_OVERRIDES = [
    "experiment=kinetics/slowfast_8x8_r50",
    "dataset.root=unused",
    "dataset.num_classes=400",
    "base.batch_size=8",
]
# clips of the transformers and X3D; three of the eight grids, because all would take minutes
MODERN_OVERRIDES = [*KINETICS_OVERRIDES, "base.num_frames=16", "base.frame_stride=4", "grids=[4x112,16x112,16x224]"]
FEATURE_MAP_SHAPES = (
    (64, 64, 8, 28, 28),
    (64, 256, 8, 28, 28),
    (64, 8, 32, 28, 28),
    (64, 1024, 8, 7, 7),
)  # [n, c, t, h, w] of SlowFast
SMALL_FEATURE_MAP_SHAPES = ((8, 16, 2, 8, 8),)


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    sections: list[str] = key(
        [], "sections: doctor, steps, train, grids, modern, layers, compile, multigrid; empty: all"
    )
    minutes: float = key(9.0, "minutes for all sections together", above=0)
    out: str = key("gpu_check", "folder for results: a JSON or text file per section, and log.txt")


@dataclass(frozen=True)
class Section:
    """One process: the arguments of the Python interpreter, and its time limit."""

    words: Sequence[str]
    limit_s: int


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    from mgvideo.cli import keys

    return keys.read(Keys, overrides)


def run(options: Keys, cfg: DictConfig) -> None:
    """Run the sections one after the other, and print how each ended."""
    out = Path(options.out).absolute()
    sections = make_sections(out, rehearse=not torch.cuda.is_available())
    for name in options.sections:
        require(name in sections, f"sections: there is no {name}; choose from {', '.join(sections)}")
    with explain_write_errors("out", out):
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed below
    deadline = time.monotonic() + 60 * options.minutes
    with log:
        names = options.sections or list(sections)
        for i, name in enumerate(names):
            line = _run_section(name, sections[name], deadline - time.monotonic(), log)
            limits = sum(sections[later].limit_s for later in names[i + 1 :])
            left = format_duration(max(0.0, min(limits, deadline - time.monotonic())))
            print(f"{line}; {i + 1} of {len(names)}, at most {left} left", flush=True)
            log.write(f"{line}\n")
    print(f"results: {out}")


def _run_section(name: str, section: Section, left_s: float, log: Any) -> str:
    if left_s < 10:
        return f"{name}: no time left"
    started, limit = time.monotonic(), min(section.limit_s, left_s)
    words = [sys.executable, *section.words]
    environment = {**os.environ, "MGVIDEO_TEST_DEVICE": "cuda" if torch.cuda.is_available() else "cpu"}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit)
        end = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        end = f"stopped at its limit of {limit:.0f} s"
    return f"{name}: {end}, {time.monotonic() - started:.0f} s"


def make_sections(out: Path, rehearse: bool) -> dict[str, Section]:
    """Return the sections, the most important first. `rehearse` makes them small enough for a CPU."""
    program = ["-m", "mgvideo.cli"]
    step = [*program, "benchmark", "step", "rounds=1", "format=json"]
    if rehearse:
        grids = [*step, "clips=1", "seconds=0.1", "variants=[fp32/contiguous/off,auto/channels_last/off/2]"]
        modern = [*step, "clips=1", "seconds=0.1", "grids=[4x45]", "models=[x3d_small,mvit_small,vit_small]"]
        modern += ["variants=[fp32/contiguous/off,fp32/channels_last/off]"]
        compiled = [*step, "clips=1", "seconds=0.1", "grids=[4x45]", "variants=[fp32/contiguous/off]"]
        tests = ["-k", "batch_norm or mask or pooling"]
        small = [
            "base.epochs=0.1",
            "base.lr_milestones=[]",
            "base.warmup_epochs=0",
            "test.enable=false",
            "train.evals_per_phase=0",
        ]
    else:
        networks = "models=[slowfast_8x8_r50,i3d_r50,r2plus1d_18]"
        variants = "bf16/channels_last/off,bf16/channels_last/off/8,fp32/contiguous/off"
        short = ["seconds=0.3", "tune=false"]
        grids = [*step, *KINETICS_OVERRIDES, networks, "clips=16", *short, f"variants=[{variants}]"]
        networks, variants = "models=[x3d_m,mvit_v2_s,vit_b]", "bf16/channels_last/off,bf16/contiguous/off"
        modern = [*step, *MODERN_OVERRIDES, networks, "clips=8", *short]
        modern += [f"variants=[fp32/contiguous/off,{variants}]"]
        modes = ("off", "off/8", "default", "default/8", "reduce-overhead", "reduce-overhead/8")
        variants = ",".join(f"bf16/channels_last/{mode}" for mode in modes)
        compiled = [*step, *KINETICS_OVERRIDES, "clips=8", "seconds=0.6", "grids=[8x112]", f"variants=[{variants}]"]
        tests, small = [], []
    return {
        "doctor": Section([*program, "doctor", "format=json"], 60),
        "steps": Section(["-m", "pytest", "-q", "-n", "4", "tests/gpu", *tests], 150),
        "train": Section([*program, "run", f"output_dir={out / 'run'}", "train.profile=5", *small], 100),
        "grids": Section([*grids, f"out={out / 'grids.json'}"], 130),
        "modern": Section([*modern, f"out={out / 'modern.json'}"], 90),
        "layers": Section(["-m", "mgvideo.cli.benchmark.gpu", str(out / "layers.json")], 60),
        "compile": Section([*compiled, f"out={out / 'compile.json'}"], 110),
        "multigrid": Section(
            [*program, "benchmark", "train", "format=json", f"out={out / 'multigrid.json'}", *small], 120
        ),
    }


def measure_layers(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Measure milliseconds of a forward and backward pass of variants of layers.

    Batch norm: contiguous, channels_last_3d, as a 4-D view, and in eight groups. Max pooling: 3-D and 2-D. Depthwise
    convolution: contiguous and channels_last_3d.
    """
    return {
        f"{name}, {'×'.join(map(str, shape))}": _milliseconds(forward, clips.detach().requires_grad_())
        for shape in shapes
        for name, (forward, clips) in _layer_variants(shape, device).items()
    }


def _layer_variants(
    shape: tuple[int, ...], device: torch.device
) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Return the layers to compare, by name: each as a forward function and its bf16 input."""
    clips = torch.randn(shape, device=device, dtype=torch.bfloat16)
    channels_last = clips.to(memory_format=torch.channels_last_3d)
    plain = nn.BatchNorm3d(shape[1]).to(device)
    grouped = convert_group_batchnorm(nn.BatchNorm3d(shape[1])).to(device)
    set_bn_groups(grouped, 8)
    window = ((1, 3, 3), (1, 2, 2), (0, 1, 1))
    kernel = torch.randn(shape[1], 1, 3, 3, 3, device=device, dtype=torch.bfloat16)

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, plain.weight, plain.bias, True)

    def depthwise(x: Tensor) -> Tensor:
        return F.conv3d(x, kernel, padding=1, groups=shape[1])

    def in_groups(x: Tensor) -> Tensor:
        with deferred_running_stats(grouped):
            return grouped(x)

    return {
        "batch norm, contiguous": (norm, clips),
        "batch norm, channels_last_3d": (norm, channels_last),
        "batch norm, 4-D view": (lambda x: norm(x.flatten(2, 3)), channels_last),
        "batch norm, 8 groups": (in_groups, channels_last),
        "max pooling, 3-D": (lambda x: F.max_pool3d(x, *window), channels_last),
        "max pooling, 2-D": (lambda x: max_pool(x, *window), channels_last),
        "depthwise convolution, contiguous": (depthwise, clips),
        "depthwise convolution, channels_last_3d": (depthwise, channels_last),
    }


def _milliseconds(forward: Callable[[Tensor], Tensor], x: Tensor, seconds: float = 0.3) -> float:
    """Return the median time of a forward and backward pass, measured for `seconds` after two warm-up passes."""
    gradient = torch.randn_like(forward(x))

    def once() -> float:
        started = time.perf_counter()
        torch.autograd.grad(forward(x), x, gradient)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return 1e3 * (time.perf_counter() - started)

    end = time.perf_counter() + seconds
    times = [once() for _ in range(3)][2:]
    while time.perf_counter() < end:
        times.append(once())
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    result = {
        "conditions": measurement_conditions(device),
        "ms": measure_layers(device, FEATURE_MAP_SHAPES if has_gpu else SMALL_FEATURE_MAP_SHAPES),
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1), encoding="utf-8")
