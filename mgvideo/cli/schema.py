"""Every key of a run outside the groups: its type, its default and what it means, declared once.

Hydra checks overrides against these types, and `--help` prints the texts. The groups (model, dataset, schedule,
optimizer, decoder) are documented in their YAML files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


def key(default: Any, text: str) -> Any:
    """A documented key; lists and blocks are made anew for each config."""
    if isinstance(default, list | type):
        return field(
            default_factory=default if isinstance(default, type) else lambda: list(default), metadata={"help": text}
        )
    return field(default=default, metadata={"help": text})


@dataclass
class BaseKeys:
    """The baseline recipe that the multigrid factors multiply; recipe/*.yaml fills it in."""

    batch: int = key(MISSING, "clips a step over all ranks; changed on the command line, base.lr follows linearly")
    frames: int = key(MISSING, "frames a clip")
    size: int = key(MISSING, "side of the square crop, pixels")
    stride: int = key(MISSING, "frames of the video between two of the clip")
    jitter: list[int] = key([], "short side before cropping, drawn from [lowest, highest], pixels")
    epochs: float = key(MISSING, "passes over the dataset of the baseline")
    lr: float = key(MISSING, "learning rate at base.batch, after warm-up")
    lr_steps: list[float] = key([0], "epochs at which LR stages start, 0 first")
    gamma: float = key(0.1, "LR factor from one stage to the next")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up")
    warmup_lr: float = key(0.0, "LR that warm-up starts from")
    lr_policy: str = key("steps", "steps or cosine")


@dataclass
class TrainKeys:
    """Around the steps of training."""

    enable: bool = key(True, "train at all")
    log_every: int = key(10, "steps between two lines of metrics.jsonl")
    evals_per_phase: int = key(1, "evaluations on the validation videos in each phase, its end included; 0: none")
    precise_bn_batches: int = key(200, "batches for precise BN before each evaluation; 0: none")


@dataclass
class TestKeys:
    """The multi-view test after training."""

    enable: bool = key(True, "test at all")
    clips: int = key(10, "uniformly spaced clips a video")
    crops: int = key(3, "crops a clip along the longer side: 1 or 3")
    size: int = key(256, "side of the crops, and short side of the frames, pixels")
    batch: int = key(8, "clips that a rank runs at once, in validation too")


@dataclass
class LoaderKeys:
    """How clips are loaded; none of it changes which clips a step sees."""

    workers: int | None = key(None, "worker processes a rank; null: one a core, shared by the ranks of the node")
    prefetch: int = key(2, "batches that each worker keeps ready")
    start_method: str = key("fork", "fork, forkserver or spawn")
    timeout: float = key(45.0, "seconds, and one more a clip of the batch, after which a silent worker counts as hung")
    max_clips_per_step: int | None = key(None, "base-grid clips that a rank holds at once; null: measured")


@dataclass
class CheckpointKeys:
    """Checkpoints are taken at the end of each phase and at each new best; more often with these."""

    every_steps: int = key(0, "steps between two; 0: none by steps")
    every_minutes: float = key(15.0, "minutes between two; 0: none by time")
    keep: int = key(3, "how many to keep besides the best")
    strict: bool = key(True, "refuse to resume what another recipe, model or dataset made; false: go on regardless")


@dataclass
class NormalizeKeys:
    """Input normalisation: what the weights were trained with."""

    mean: list[float] = key([0.45, 0.45, 0.45], "per channel, of pixels in 0–1")
    std: list[float] = key([0.225, 0.225, 0.225], "per channel, of pixels in 0–1")


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
    precision: str = key("auto", "auto, fp32, bf16 or fp16; auto says what it chose and why")
    seed: int = key(0, "of weights, order, clips and dropout")
    hang_timeout: float = key(
        45.0, "seconds that ranks wait for one that does nothing before the run ends; 0: for ever"
    )
    deterministic: bool = key(False, "refuse kernels whose result varies from run to run")
    output_dir: str = key(MISSING, "the run's folder")
    resume: str = key("auto", "auto: go on with output_dir's newest checkpoint; never; or a checkpoint's path")
    init_from: str | None = key(
        None, "weights to start from: a checkpoint of ours, PySlowFast, PyTorchVideo, torchvision"
    )


def register() -> None:
    """Make the schema known to Hydra, as the `schema` that configs/run.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=RunKeys, provider="mgvideo")
