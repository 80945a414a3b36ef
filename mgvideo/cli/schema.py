"""Every key of a run outside the groups: its type, its default and what it means, declared once.

Hydra checks overrides against these types, and `--help` prints the texts. The groups (model, dataset, schedule,
optimizer, decoder) are documented in their YAML files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from mgvideo.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = ("off", "default", "reduce-overhead", "max-autotune")


def key(default: Any, text: str, **limits: Any) -> Any:
    """A documented key; lists and blocks are made anew for each config.

    Limits: `least` (a number from there up), `above` (a number above that), `length` (of a list, whose items the others
    then hold for), `choices`.
    """
    about = {"help": text, "limits": limits}
    if isinstance(default, list | type):
        return field(default_factory=default if isinstance(default, type) else lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def check_values(cfg: DictConfig) -> None:
    """Hold every key against its limits; what its type allows and the recipe forbids, `Base` and others refuse.

    Raises:
        UserError: the first key that is outside, and what it may be.
    """
    for entry in fields(RunKeys):
        block = entry.default_factory() if callable(entry.default_factory) else None
        if is_dataclass(block):
            for inner in fields(block):
                check_value(f"{entry.name}.{inner.name}", cfg[entry.name][inner.name], inner.metadata["limits"])
        elif entry.metadata.get("limits"):
            check_value(entry.name, cfg[entry.name], entry.metadata["limits"])


def check_value(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Hold one value against its limits. Raises UserError."""
    if value is None:
        return
    items = value if "length" in limits else [value]
    if "length" in limits and len(value) != limits["length"]:
        raise UserError(f"{name}={value}: give {limits['length']} numbers")
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"{name}={value}: choose one of {', '.join(map(str, limits['choices']))}")
    if "least" in limits and not all(limits["least"] <= item < math.inf for item in items):
        raise UserError(f"{name}={value}: give {limits['least']} or more")
    if "above" in limits and not all(limits["above"] < item < math.inf for item in items):
        raise UserError(f"{name}={value}: give more than {limits['above']}")


@dataclass
class BaseKeys:
    """The baseline recipe that the multigrid factors multiply; recipe/*.yaml fills it in."""

    batch_size: int = key(MISSING, "clips a step over all ranks; changed on the command line, base.lr follows linearly")
    num_frames: int = key(MISSING, "frames a clip")
    crop_size: int = key(MISSING, "side of the square crop, pixels")
    frame_stride: int = key(MISSING, "frames of the video between two of the clip")
    short_side: list[int] = key([], "short side before cropping, drawn from [lowest, highest], pixels")
    epochs: float = key(
        MISSING,
        "passes over the dataset of the baseline; changed alone, base.lr_milestones and base.warmup_epochs follow",
    )
    lr: float = key(MISSING, "learning rate at base.batch_size, after warm-up")
    lr_milestones: list[float] = key([], "epochs at which the LR drops by gamma and a new LR stage starts")
    gamma: float = key(0.1, "LR factor from one stage to the next")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up")
    warmup_lr: float = key(0.0, "LR that warm-up starts from")
    lr_policy: str = key("step", "step or cosine")


@dataclass
class TrainKeys:
    """Around the steps of training."""

    enable: bool = key(True, "train at all")
    micro_batch_clips: int | None = key(
        None, "base-grid clips in a micro-batch, of which a rank accumulates gradients; null: measured", least=1
    )
    log_every: int = key(10, "steps between two lines of metrics.jsonl", least=1)
    evals_per_phase: int = key(1, "evaluations on the validation videos a phase, its end included; 0: none", least=0)
    precise_bn_clips: int = key(
        12_800,
        "clips for precise BN before each evaluation and the test, at most one pass over the dataset; 0: none",
        least=0,
    )
    profile: int = key(0, "steps to trace with torch.profiler, after the first few, into output_dir/profile", least=0)


@dataclass
class TestKeys:
    """The multi-view test after training."""

    enable: bool = key(True, "test at all")
    num_clips: int = key(10, "uniformly spaced clips a video", least=1)
    num_crops: int = key(3, "crops a clip along the longer side: 1 or 3", choices=(1, 3))
    crop_size: int = key(256, "side of the crops, and short side of the frames, pixels", least=1)
    batch_size: int = key(8, "clips that a rank runs at once, in validation too", least=1)


@dataclass
class LoaderKeys:
    """How clips are loaded; none of it changes which clips a step sees."""

    num_workers: int | None = key(
        None, "worker processes a rank; null: one a core that it has to itself, at most 16", least=0
    )
    prefetch_factor: int = key(2, "batches that each worker keeps ready", least=1)
    start_method: str = key("forkserver", "forkserver, fork or spawn", choices=("fork", "forkserver", "spawn"))
    timeout: float = key(
        45.0, "seconds, and one more a clip of the batch, after which a silent worker counts as hung", above=0
    )
    low_priority: bool | None = key(
        None, "workers run when cores have nothing else to do; null: where these train the network"
    )


@dataclass
class CheckpointKeys:
    """Checkpoints are taken at the end of each phase and at each new best; more often with these."""

    every_steps: int = key(0, "steps between two; 0: none by steps", least=0)
    every_minutes: float = key(15.0, "minutes between two; 0: none by time", least=0)
    keep: int = key(3, "how many to keep besides the best", least=1)
    strict: bool = key(True, "refuse to resume what another recipe, model, dataset or plan made; false: warn")


@dataclass
class NormalizeKeys:
    """Input normalisation: what the weights were trained with."""

    mean: list[float] = key([0.45, 0.45, 0.45], "per channel, of pixels in 0–1", length=3, least=0)
    std: list[float] = key([0.225, 0.225, 0.225], "per channel, of pixels in 0–1", length=3, above=0)


@dataclass
class RunKeys:
    """A run."""

    model: Any = MISSING
    dataset: Any = MISSING
    schedule: Any = MISSING
    optimizer: Any = MISSING
    decoder: Any = MISSING
    base: BaseKeys = key(BaseKeys, "")
    train: TrainKeys = key(TrainKeys, "")
    test: TestKeys = key(TestKeys, "")
    loader: LoaderKeys = key(LoaderKeys, "")
    checkpoint: CheckpointKeys = key(CheckpointKeys, "")
    normalize: NormalizeKeys = key(NormalizeKeys, "")
    precision: str = key("auto", "auto, fp32, bf16 or fp16; auto says what it chose and why", choices=PRECISIONS)
    compile: str = key(
        "off", "off, or torch.compile's mode: default, reduce-overhead (CUDA graphs), max-autotune", choices=COMPILE
    )
    seed: int = key(0, "of weights, order, clips and dropout", least=0)
    hang_timeout: float = key(
        45.0, "seconds that ranks wait for one that does nothing before the run ends; 0: for ever", least=0
    )
    deterministic: bool = key(False, "end the run at a kernel whose result varies from run to run")
    output_dir: str = key(MISSING, "the run's folder")
    resume: str = key("auto", "auto: go on with output_dir's newest checkpoint; never; or a checkpoint's path")
    init_from: str | None = key(
        None, "weights to start from: a checkpoint of ours, PySlowFast, PyTorchVideo, torchvision"
    )
    init_from_key: str | None = key(
        None, "where init_from holds several copies of the network, which: model or model_ema; null: an average first"
    )


def register() -> None:
    """Make the schema known to Hydra, as the `schema` that configs/run.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=RunKeys, provider="mgvideo")
