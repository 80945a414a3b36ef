"""Plans have exactly the phases, epochs and learning rates of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgvideo.plan.json_format import plan_to_json
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import multigrid, short

GOLDEN = json.loads((Path(__file__).parents[1] / "data/schedules.json").read_text())


def make_case_plan(case: dict[str, Any]) -> Plan:
    recipe = case["base"]
    base = Base(
        batch_size=recipe["global_batch"],
        num_frames=recipe["frames"],
        crop_size=recipe["crop"],
        frame_stride=recipe["temporal_stride"],
        short_side=(256, 320),
        epochs=recipe["epochs"],
        lr=recipe["base_lr"],
        lr_milestones=recipe["lr_steps"][1:],
        gamma=recipe["gamma"],
        warmup_epochs=recipe["warmup_epochs"],
        warmup_lr=recipe["warmup_start_lr"],
    )
    assert case["short_cycle"]
    schedule = multigrid if case["long_cycle"] else short
    return schedule(base, 240_000, name="golden", epoch_factor=case["epoch_factor"])


def select_keys(value: Any, template: Any) -> Any:
    """Return `value` without the dict keys that `template` lacks, at every depth."""
    if isinstance(template, dict):
        return {key: select_keys(value[key], template[key]) for key in template}
    if isinstance(template, list):
        assert len(value) == len(template)
        return [select_keys(a, b) for a, b in zip(value, template, strict=True)]
    return value


@pytest.mark.parametrize("golden", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_epochs_and_learning_rates(golden: dict[str, Any]) -> None:
    ours = plan_to_json(make_case_plan(golden), at=[epoch for epoch, _ in golden["lr_at_epoch"]])
    assert ours["max_epoch"] == golden["max_epoch"]
    assert ours["lr_milestones"] == golden["lr_milestones"]
    published = golden["relative_lrs"][: len(ours["relative_lrs"])]  # the reference lists more LRs than milestones
    assert ours["relative_lrs"] == pytest.approx(published, rel=1e-12)
    for (_, lr), (epoch, expected) in zip(ours["lr_at_epoch"], golden["lr_at_epoch"], strict=True):
        assert lr == pytest.approx(expected, rel=1e-12), epoch


WITH_PHASES = [case for case in GOLDEN if case["phases"]]  # the reference lists none for the short cycle alone


@pytest.mark.parametrize("golden", WITH_PHASES, ids=[case["name"] for case in WITH_PHASES])
def test_phases_slots_and_batch_norm(golden: dict[str, Any]) -> None:
    ours = plan_to_json(make_case_plan(golden), gpus=golden["base"]["gpus"])
    assert select_keys(ours["phases"], golden["phases"]) == golden["phases"]
