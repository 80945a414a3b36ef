"""Declare every config key of a run outside the groups: its type, default, limits and help text.

Hydra checks overrides against these types, and `--help` prints the texts. The YAML files of the groups (model, dataset,
schedule, optimizer, decoder) document their own keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from mgvideo.errors import UserError
from mgvideo.plan.drafts import LR_SCALING
from mgvideo.tracking.trackers import TRACKERS

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SAMPLERS = ("shuffled", "balanced")
COMPILE = ("off", "default", "reduce-overhead", "max-autotune")


def key(default: Any, text: str, **limits: Any) -> Any:
    """Return a dataclass field for a config key with a help text.

    Each config gets its own copy of a `default` that is a list, and its own instance of one that is a class (a block of
    keys).

    Limits: `least` (smallest allowed number), `most` (largest), `above` (numbers must be greater), `length` (of a list;
    the others then apply to each item), `choices` (allowed values), `kind` (what values of the type Any may be, in
    words).
    """
    metadata = {"help": text, "limits": limits}
    if isinstance(default, list | type):
        factory = default if isinstance(default, type) else lambda: list(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_values(cfg: DictConfig) -> None:
    """Check every key against its limits. Limits that depend on several keys are checked elsewhere, as in `Base`.

    Raises:
        UserError: Names the first key that is outside its limits, and the values that it can have.
    """
    for entry in fields(RunKeys):
        block = entry.default_factory() if callable(entry.default_factory) else None
        if is_dataclass(block):
            for inner in fields(block):
                check_value(f"{entry.name}.{inner.name}", cfg[entry.name][inner.name], inner.metadata["limits"])
        elif entry.metadata.get("limits"):
            check_value(entry.name, cfg[entry.name], entry.metadata["limits"])


def check_value(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raise UserError if a value is outside its limits. None is always allowed."""
    if value is None:
        return
    items = value if "length" in limits else [value]
    if "length" in limits and len(value) != limits["length"]:
        raise UserError(f"{name}={value}: give {limits['length']} numbers")
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"{name}={value}: choose one of {', '.join(map(str, limits['choices']))}")
    if "least" in limits and not all(limits["least"] <= item < math.inf for item in items):
        raise UserError(f"{name}={value}: give {limits['least']} or more")
    if "most" in limits and not all(item <= limits["most"] for item in items):
        raise UserError(f"{name}={value}: give at most {limits['most']}")
    if "above" in limits and not all(limits["above"] < item < math.inf for item in items):
        raise UserError(f"{name}={value}: give more than {limits['above']}")


@dataclass
class BaseKeys:
    """The baseline recipe, which recipe/*.yaml fills in and multigrid scales; null: from dataset and network."""

    batch_size: int | None = key(
        MISSING, "global batch size: clips per step over all ranks; base.lr scales with it unless set too"
    )
    num_frames: int | None = key(MISSING, "frames per clip")
    crop_size: int | None = key(MISSING, "side of the square training crop, in pixels")
    frame_stride: int | None = key(MISSING, "temporal stride: a clip takes every n-th frame of the video")
    short_side: list[int] | None = key(
        [], "[min, max] of the random short side that frames are resized to before cropping, in pixels"
    )
    epochs: float | None = key(
        MISSING,
        "epochs of the baseline; base.lr_milestones and base.warmup_epochs scale with it unless set too",
    )
    lr: float | None = key(MISSING, "learning rate at base.batch_size, after warm-up")
    lr_milestones: list[float] | None = key(
        [], "epochs at which the LR is multiplied by base.gamma; each starts a new LR stage"
    )
    gamma: float = key(0.1, "LR factor at each milestone")
    warmup_epochs: float | None = key(0.0, "epochs of linear warm-up")
    warmup_lr: float | None = key(0.0, "LR at the start of warm-up")
    warmup_by: str | None = key(
        None,
        "epochs: the warm-up lasts warmup_epochs; steps: their share of the baseline's steps; "
        "null: steps in cooldown, epochs in all others",
    )
    lr_policy: str = key(
        "step", "LR schedule: step, cosine, or wsd (constant, then from the last milestone linear to 0)"
    )
    final_lr: float = key(0.0, "LR at the end of a cosine")
    cosine_after_warmup: bool = key(False, "the cosine starts after the warm-up; false: at epoch 0")


@dataclass
class RecipeKeys:
    """Values of a recipe for keys of schedule and optimizer, whose YAML files refer to them; override those keys."""

    jitter: str = key("paper", "schedule.jitter of short, long and multigrid", choices=("paper", "scaled"))
    round_epochs: bool = key(True, "schedule.round_epochs of short, long and multigrid")
    weight_decay: float = key(1e-4, "optimizer.weight_decay of sgd", least=0)
    lr_scaling: str = key(
        "linear",
        "how the LR follows the batch size: linear, sqrt or none; the optimizer's YAML sets it",
        choices=LR_SCALING,
    )


@dataclass
class TrainKeys:
    """Training: micro-batches, clipping, moving average, frozen parts, logging, validation, precise BN, profiling."""

    enable: bool = key(True, "train; false: only test")
    micro_batch_clips: int | None = key(
        None,
        "micro-batch size per rank for gradient accumulation, in clips of base size; null: as many as memory holds",
        least=1,
    )
    clip_grad_norm: float | None = key(
        None,
        "scale gradients down to this norm, over all parameters of a step, if theirs is larger; null: off",
        above=0,
    )
    ema: float | None = key(
        None,
        "decay per base batch of a moving average of the weights, such as 0.9999, which is evaluated; null: no average",
        least=0,
    )
    freeze: Any = key(
        None,
        "parts that keep their weights: backbone (all but the classifier), or names such as [stem,res2]; null: none",
        kind="str, list of str or null",
    )
    log_every: int = key(10, "steps between two lines of metrics.jsonl", least=1)
    evals_per_phase: int = key(1, "validations per phase of the plan, the last at its end; 0: none", least=0)
    precise_bn_clips: int = key(
        12_800,
        "training clips for precise BN statistics before each validation and the test, at most one epoch; 0: off",
        least=0,
    )
    class_weights: Any = key(
        None,
        "factors of the loss of each class: balanced (inverse to its number of training videos), a list in the order "
        "of the classes, or a file with a line `class,weight` for each; null: 1",
    )
    label_smoothing: float = key(
        0.0, "share of the label that is spread evenly over all classes; for one class a video", least=0, most=1
    )
    profile: int = key(
        0, "steps to trace with torch.profiler into output_dir/profile, after a few warm-up steps; 0: none", least=0
    )


@dataclass
class AugmentKeys:
    """Augmentation of training clips, besides base.short_side and dataset.train.flip; augment/*.yaml fills it in."""

    crop_area: list[float] | None = key(
        None,
        "[min, max] area of a random-resized crop, as a part of the frame; null: squares, from base.short_side",
        length=2,
        above=0,
    )
    crop_aspect: list[float] = key(
        [0.75, 1.3333], "[min, max] width of a random-resized crop divided by its height", length=2, above=0
    )
    color_jitter: float = key(
        0.0,
        "brightness, contrast and saturation are multiplied by 1 ± this at most, in random order; 0: off",
        least=0,
        most=1,
    )
    randaugment_ops: int = key(0, "operations of RandAugment for each clip; 0: off", least=0)
    randaugment_magnitude: float = key(7.0, "mean magnitude of RandAugment, 0 to 10", least=0, most=10)
    randaugment_magnitude_std: float = key(0.5, "standard deviation of the magnitude of RandAugment", least=0)
    erasing_prob: float = key(
        0.0, "probability that a part of all frames of a clip is replaced by noise", least=0, most=1
    )
    mixup_alpha: float = key(0.0, "mixup: the share of a clip is from Beta(alpha, alpha); 0: off", least=0)
    cutmix_alpha: float = key(0.0, "CutMix: the area that a clip keeps is from Beta(alpha, alpha); 0: off", least=0)
    mix_prob: float = key(1.0, "probability that a clip is mixed, if mixup or CutMix is on", least=0, most=1)
    cutmix_prob: float = key(0.5, "probability of CutMix in place of mixup, if both are on", least=0, most=1)
    repeat: int = key(
        1,
        "clips of each video that is decoded; the clips of base.batch_size are of this many times fewer videos",
        least=1,
    )


@dataclass
class TestKeys:
    """The multi-view test after training."""

    enable: bool = key(True, "run the multi-view test")
    num_clips: int = key(10, "uniformly spaced clips per video", least=1)
    num_crops: int = key(3, "crops per clip along the longer side: 1 or 3", choices=(1, 3))
    crop_size: int | None = key(
        256, "side of the square crops and short side of the frames, in pixels; null: follows base.crop_size", least=1
    )
    batch_size: int = key(8, "clips per batch on each rank, also in validation", least=1)


@dataclass
class SamplingKeys:
    """Frames and crops of clips; published recipes set them. docs/datasets/sampling.md has the rules."""

    protocol: str = key(
        "regular",
        "published: the frames and crops of PySlowFast; regular: whole strides, test clips up to the video's end",
        choices=("regular", "published"),
    )
    target_fps: float | None = key(
        None, "frame rate at which base.frame_stride counts; null: count the frames of each file", above=0
    )
    antialias: bool = key(True, "resize frames with antialiasing, which PySlowFast does not")


@dataclass
class LoaderKeys:
    """Loader workers; these keys do not change which clips a step uses."""

    num_workers: int | None = key(
        None,
        "worker processes per rank; null: one per CPU core of the rank, at most 16; 0: load in the main process",
        least=0,
    )
    prefetch_factor: int = key(2, "batches that each worker loads in advance", least=1)
    start_method: str = key(
        "forkserver", "how workers start: forkserver, fork or spawn", choices=("fork", "forkserver", "spawn")
    )
    timeout: float = key(
        45.0,
        "seconds, plus one per clip of the batch, after which a worker that returns nothing counts as hung",
        above=0,
    )
    low_priority: bool | None = key(
        None, "run workers at idle priority, so that training gets the CPU first; null: true if there is no GPU"
    )


@dataclass
class CheckpointKeys:
    """Checkpoints, besides those at the end of each phase and at each new best validation result."""

    every_steps: int = key(0, "steps between two checkpoints; 0: off", least=0)
    every_minutes: float = key(15.0, "minutes between two checkpoints; 0: off", least=0)
    keep: int = key(3, "newest checkpoints to keep, besides the best", least=1)
    strict: bool = key(
        True, "refuse to resume a checkpoint of another recipe, model, dataset or plan; false: only warn"
    )


@dataclass
class NormalizeKeys:
    """Input normalisation; model/*.yaml sets the values that the published weights were trained with."""

    mean: list[float] = key([0.45, 0.45, 0.45], "mean per channel, for pixels in 0–1", length=3, least=0)
    std: list[float] = key(
        [0.225, 0.225, 0.225], "standard deviation per channel, for pixels in 0–1", length=3, above=0
    )


@dataclass
class RunKeys:
    """All config keys of a run."""

    model: Any = MISSING
    dataset: Any = MISSING
    schedule: Any = MISSING
    optimizer: Any = MISSING
    decoder: Any = MISSING
    base: BaseKeys = key(BaseKeys, "")
    recipe: RecipeKeys = key(RecipeKeys, "")
    train: TrainKeys = key(TrainKeys, "")
    augment: AugmentKeys = key(AugmentKeys, "")
    test: TestKeys = key(TestKeys, "")
    sampling: SamplingKeys = key(SamplingKeys, "")
    loader: LoaderKeys = key(LoaderKeys, "")
    checkpoint: CheckpointKeys = key(CheckpointKeys, "")
    normalize: NormalizeKeys = key(NormalizeKeys, "")
    published_clip: list[int] | None = key(
        None,
        "[frames, stride, crop size] that the model's published weights were trained with; null: unknown",
        length=3,
        least=1,
    )
    precision: str = key(
        "auto", "auto, fp32, bf16 or fp16; auto chooses by device and prints the reason", choices=PRECISIONS
    )
    compile: str = key(
        "off",
        "off, or the mode of torch.compile: default, reduce-overhead (CUDA graphs), max-autotune",
        choices=COMPILE,
    )
    sampler: str = key(
        "shuffled",
        "shuffled: each pass has every video once; balanced: each pass has every class once, and a video of it",
        choices=SAMPLERS,
    )
    seed: int = key(0, "seed of the initial weights, the order of clips, their augmentation and dropout", least=0)
    hang_timeout: float = key(
        45.0, "seconds without progress on a rank after which the other ranks end the run; 0: no limit", least=0
    )
    deterministic: bool = key(False, "use deterministic algorithms, and stop with an error if an operation has none")
    tracking: str = key(
        "none", "log to a tracker too, beside TensorBoard: none, wandb (Weights & Biases) or mlflow", choices=TRACKERS
    )
    model_option: str | None = key(
        None, "name of the network in messages and reports; run.yaml sets the option of model"
    )
    output_dir: str = key(MISSING, "the run's folder, for checkpoints, logs and reports")
    resume: str = key(
        "auto", "auto: from the newest checkpoint in output_dir; never: start anew; or the path of a checkpoint"
    )
    init_from: str | None = key(
        None,
        "initial weights: a run's folder (best checkpoint, else newest), or a file, URL or hf://org/name, of mgvideo, "
        "PySlowFast, PyTorchVideo or torchvision",
    )
    init_from_key: str | None = key(
        None,
        "which weights of init_from, if it has several: model or model_ema; null: an average if there is one",
    )


def _experiment_folder() -> str:
    """Return the folder that the default of output_dir has for the chosen experiment, with a final /, or ""."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")  # the key is missing with ~experiment
    return f"{str(experiment).replace('/', '-')}/" if experiment else ""


def _model_option() -> str | None:
    """Return the chosen option of the group model; None if the config was composed outside a program."""
    return HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None


# On import, because a submitit job imports this module but does not call register().
OmegaConf.register_new_resolver("experiment_folder", _experiment_folder, replace=True)
OmegaConf.register_new_resolver("model_option", _model_option, replace=True)


def register() -> None:
    """Add the schema to Hydra's config store under the name `schema`, which configs/run.yaml refers to."""
    ConfigStore.instance().store(name="schema", node=RunKeys, provider="mgvideo")
