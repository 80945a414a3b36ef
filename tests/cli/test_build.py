"""Build objects from a config: the precision that all ranks choose, weights of a run's folder, recipes with nulls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import tiny_plan

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_model, build_plan, fall_back_if_convolutions_are_wrong
from mgvideo.engine.precision import ConvolutionFaults, Precision, choose_precision
from mgvideo.errors import UserError
from mgvideo.models.small import i3d_small, r2plus1d_small
from mgvideo.storage.checkpoints import Checkpoints

BF16 = Precision(torch.device("cpu"), torch.bfloat16, True, "a test")
GOOD = ConvolutionFaults()
WRONG = ConvolutionFaults(wrong=("wrong weight gradients of Conv3d(3, 8) at 4x24",))
SLOW = ConvolutionFaults(slow=("convolutions take 3.0 times as long as in float32",))


def choose(
    monkeypatch: pytest.MonkeyPatch, faults: list[ConvolutionFaults], rank: int, precision: str = "auto"
) -> tuple[Precision, list[str]]:
    """Return the precision and warnings of `rank` if the probes of all ranks return `faults`."""
    monkeypatch.setattr("mgvideo.cli.build.probe_convolutions", lambda *_: faults[rank])
    monkeypatch.setattr("mgvideo.cli.build.gather_objects", lambda _: faults)
    model = BF16.place(i3d_small(8, width=8))
    return fall_back_if_convolutions_are_wrong(SimpleNamespace(precision=precision), model, tiny_plan(), BF16)


def test_correct_kernels_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, [GOOD, GOOD], 0) == (BF16, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_gradients_on_one_rank_switch_all_ranks_to_float32(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = choose(monkeypatch, [GOOD, WRONG], rank)
    assert (precision.name, precision.channels_last) == ("fp32", False)
    assert "wrong weight gradients of Conv3d(3, 8) at 4x24" in warning
    assert "training in float32 instead" in warning


@pytest.mark.parametrize("rank", [0, 1])
def test_slow_kernels_only_cause_a_warning(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = choose(monkeypatch, [SLOW, GOOD], rank)
    assert precision is BF16
    assert "3.0 times as long" in warning


def test_explicit_precision_is_kept_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, warnings = choose(monkeypatch, [WRONG, SLOW], 0, precision="bf16")
    assert precision is BF16
    assert len(warnings) == 2
    assert warnings[1].endswith("set precision=fp32 or install another version of torch")


def test_init_from_takes_the_best_checkpoint_of_a_run_else_the_newest(tmp_path: Path) -> None:
    checkpoints, networks = Checkpoints(tmp_path / "checkpoints"), {}
    folder = ["model=r2plus1d_small", "model.width=4", f"init_from={tmp_path}"]
    precision = choose_precision("fp32", torch.device("cpu"))
    with pytest.raises(UserError, match=r"init_from=.*: this folder has no checkpoints"):
        build_model(compose_config("run", folder), precision)
    for step, is_best in ((1, False), (2, False), (1, True)):
        networks[step] = r2plus1d_small(8, width=4).state_dict() if not is_best else networks[step]
        checkpoints.save(step, {"model": networks[step], "progress": {}}, is_best)
        checkpoints.wait()
        loaded = build_model(compose_config("run", folder), precision).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in networks[step].items())


def test_folder_recipe_is_computed_from_the_dataset_and_overrides_are_kept() -> None:
    cfg = compose_config("run", ["dataset=folder", "model=slow_r50", "dataset.root=unused", "base.epochs=40"])
    assert (cfg.base.num_frames, cfg.base.frame_stride, cfg.base.crop_size, cfg.test.crop_size) == (8, 8, 224, 256)
    assert cfg.base.batch_size is None
    plan = build_plan(cfg, 48)
    assert (plan.base.batch_size, plan.base.epochs, plan.base.lr_milestones) == (8, 40, (20, 32))
    assert plan.notes[0] == (
        "recipe for 48 videos and random weights (init_from=… takes published ones): base.batch_size=8 base.lr=0.025 "
        "base.lr_milestones=[20,32] base.warmup_epochs=4 base.warmup_lr=0.0025 (set any of them to change it)"
    )
    assert plan.notes[1].startswith(f"the plan has only {plan.steps} steps")
    assert cfg.base.batch_size == 8, "config.yaml holds what was computed"
