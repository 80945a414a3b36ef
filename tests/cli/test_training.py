"""The keys of augmentation, sampler and loss: what they build, and one line for values that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from training import TINY

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_data, build_plan
from mgvideo.cli.resume import resume_fingerprint
from mgvideo.cli.schema import check_values
from mgvideo.cli.training import (
    balanced_weights,
    build_augmentation,
    build_sampler,
    build_task,
    class_weights,
    set_crops,
)
from mgvideo.datasets.sampling import Sampling
from mgvideo.engine.precision import choose_precision
from mgvideo.errors import UserError
from mgvideo.storage.checkpoints import describe_differences

NAMES = ["walk", "run, fast", "jump"]


class Labelled:
    """A dataset of which only labels and sampling are needed."""

    def __init__(self, labels: list) -> None:
        self.labels, self.sampling = np.array(labels), Sampling()

    def __len__(self) -> int:
        return len(self.labels)


DATASET = Labelled([0, 0, 0, 1, 1, 1, 1, 2])


def composed(*overrides: str) -> DictConfig:
    cfg = compose_config("run", [*overrides, "output_dir=none"])
    check_values(cfg)
    return cfg


def test_options_build_what_their_files_say() -> None:
    none, light, strong = (composed(f"augment={name}") for name in ("none", "light", "strong"))
    device = torch.device("cpu")
    assert build_augmentation(none, 8, device) is None
    for cfg, jitter, operations in ((light, 0.4, 0), (strong, 0.0, 4)):
        augmentation, dataset = build_augmentation(cfg, 8, device), Labelled([0, 1])
        assert augmentation is not None
        assert (augmentation.options.color_jitter, augmentation.options.randaugment_ops) == (jitter, operations)
        assert augmentation.options.mixes == (cfg is strong)
        set_crops(cfg, dataset)
        assert dataset.sampling == Sampling(crop_area=(0.08, 1.0), crop_aspect=(0.75, 1.3333))
    task = build_task(strong, DATASET, NAMES)
    assert (task.label_smoothing, task.class_weights) == (0.1, None)  # type: ignore[attr-defined]
    plan, repeated = (build_plan(cfg, 1000) for cfg in (none, strong))
    assert repeated.dataset_size == 2 * plan.dataset_size, "an epoch has two clips of each video"
    assert build_sampler(strong, repeated, DATASET).repeat == 2


def test_balanced_weights_have_mean_one_over_videos() -> None:
    weights = class_weights("balanced", DATASET, [*NAMES, "unseen"])
    assert weights is not None
    assert weights[DATASET.labels].mean() == pytest.approx(1)
    torch.testing.assert_close(weights, torch.tensor([8 / 9, 8 / 12, 8 / 3, 1]))
    several = np.array([[True, True, False], [True, False, False]])
    torch.testing.assert_close(balanced_weights(several, 3), torch.tensor([0.75, 1.5, 1]))


def test_weights_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    assert class_weights([1, 0.5, 0], DATASET, NAMES).tolist() == [1, 0.5, 0]  # type: ignore[union-attr]
    file = tmp_path / "weights.csv"
    file.write_text("# class,weight\njump,3\n\nrun, fast, 2\nwalk,1\n")
    assert class_weights(str(file), DATASET, NAMES).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    assert composed("train.class_weights=[1,2,3]").train.class_weights == [1, 2, 3]
    assert composed(f"train.class_weights={file}").train.class_weights == str(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"class_weights: 2 weights for 3 classes"),
        ([1, -1, 2], r"class run, fast has weight -1: give a number from 0 up"),
        ([1, float("nan"), 2], "has weight nan"),
        ([0, 0, 0], "all weights are 0"),
        (3, "class_weights=3: give null, balanced, a list or a file"),
        ("/nowhere.csv", "/nowhere.csv"),
        ("walk,1\nfly,2\n", r":2: 'fly' is not a class"),
        ("walk,1\nwalk,2\n", r":2: class walk has a second weight"),
        ("walk;1\n", r":1: expected class,weight, found 'walk;1'"),
        ("walk,1\njump,1\n", "class run, fast has no weight"),
        ("walk,1\njump,1\nrun, fast,-2\n", "class run, fast has weight -2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, value: object, message: str) -> None:
    if isinstance(value, str) and not value.startswith("/"):
        (tmp_path / "weights.csv").write_text(value)
        value = str(tmp_path / "weights.csv")
    with pytest.raises(UserError, match=message) as error:
        class_weights(value, DATASET, NAMES)
    assert "\n" not in str(error.value)


def test_a_balanced_sampler_needs_one_class_a_video() -> None:
    cfg = composed("sampler=balanced")
    plan = build_plan(cfg, 1000)
    assert build_sampler(cfg, plan, DATASET).classes is not None
    with pytest.raises(UserError, match="sampler=balanced needs one class a video"):
        build_sampler(cfg, plan, Labelled([[True, False]]))
    with pytest.raises(UserError, match="list has no attribute `labels`"):
        build_sampler(cfg, plan, [])


def build_all(overrides: str) -> None:
    cfg = composed(*overrides.split())
    set_crops(cfg, Labelled([0]))
    build_plan(cfg, 1000)
    build_task(cfg, DATASET, NAMES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("augment.crop_area=[0.5,0.1]", r"crop_area=\[0.5, 0.1\]: the smallest goes first, did you mean \[0.1, 0.5\]"),
        ("augment.crop_area=[0.5,1.5]", "at most 1"),
        ("augment.crop_area=[0,1]", "augment.crop_area=.*give more than 0"),
        ("augment.crop_area=[0.1,1] augment.crop_aspect=[2,1]", "crop_aspect=.*the smallest goes first"),
        ("augment.mix_prob=1.5", "augment.mix_prob=1.5: give at most 1"),
        ("augment.erasing_prob=-0.1", "augment.erasing_prob=-0.1: give 0 or more"),
        ("augment.randaugment_magnitude=11", "give at most 10"),
        ("augment.repeat=3", "base.batch_size=16 is no multiple of augment.repeat=3"),
        ("augment.repeat=0", "augment.repeat=0: give 1 or more"),
        ("train.label_smoothing=2", "train.label_smoothing=2.0: give at most 1"),
        ("dataset.task=multi_label train.label_smoothing=0.1", "train.label_smoothing=0.1 needs one class a video"),
        ("sampler=random", "sampler=random: choose one of shuffled, balanced"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_line(overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_all(overrides)
    assert "\n" not in str(error.value)


def test_the_fingerprint_has_the_chosen_keys_as_plain_values_that_a_checkpoint_can_hold(
    motion_root: str, tmp_path: Path
) -> None:
    def fingerprint(*overrides: str) -> dict[str, Any]:
        cfg = composed(*TINY, f"dataset.root={motion_root}", *overrides)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return resume_fingerprint(cfg, build_data(cfg), choose_precision("fp32", torch.device("cpu")))

    plain = fingerprint()
    assert not [key for key in plain if key.startswith(("augment", "sampler", "train.class", "train.label"))]
    chosen = fingerprint("augment=strong", "sampler=balanced", "train.class_weights=balanced")
    torch.save(chosen, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == chosen
    lines = describe_differences(plain, chosen)
    assert "sampler was not set, is balanced" in lines
    assert "augment.crop_area was not set, is [0.08, 1.0]" in lines
    assert any(line.startswith("train.class_weights was not set, is balanced") for line in lines)
    other = fingerprint("augment=strong", "sampler=balanced", f"train.class_weights={[1] * 8}".replace(" ", ""))
    (line,) = describe_differences(chosen, other)
    assert line.startswith("train.class_weights was balanced")
