"""Plans equal the reference implementation's to the last epoch and learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgvideo.plan.json_format import plan_to_json
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import Schedule, make_plan

GOLDEN = json.loads((Path(__file__).parents[1] / "data/schedules.json").read_text())


def planned(case: dict[str, Any]) -> Plan:
    given = case["base"]
    base = Base(
        batch_size=given["global_batch"],
        num_frames=given["frames"],
        crop_size=given["crop"],
        frame_stride=given["temporal_stride"],
        short_side=(256, 320),
        epochs=given["epochs"],
        lr=given["base_lr"],
        lr_milestones=given["lr_steps"][1:],
        gamma=given["gamma"],
        warmup_epochs=given["warmup_epochs"],
        warmup_lr=given["warmup_start_lr"],
    )
    return make_plan(base, Schedule("golden", case["long_cycle"], case["short_cycle"], case["epoch_factor"]), 240_000)


def only(value: Any, like: Any) -> Any:
    """`value` without the keys that `like` does not have."""
    if isinstance(like, dict):
        return {key: only(value[key], like[key]) for key in like}
    if isinstance(like, list):
        assert len(value) == len(like)
        return [only(a, b) for a, b in zip(value, like, strict=True)]
    return value


@pytest.mark.parametrize("golden", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_epochs_and_learning_rates(golden: dict[str, Any]) -> None:
    ours = plan_to_json(planned(golden), at=[epoch for epoch, _ in golden["lr_at_epoch"]])
    assert ours["max_epoch"] == golden["max_epoch"]
    assert ours["lr_milestones"] == golden["lr_milestones"]
    stated = golden["relative_lrs"][: len(ours["relative_lrs"])]  # the rest belongs to no milestone
    assert ours["relative_lrs"] == pytest.approx(stated, rel=1e-12)
    for (_, lr), (epoch, expected) in zip(ours["lr_at_epoch"], golden["lr_at_epoch"], strict=True):
        assert lr == pytest.approx(expected, rel=1e-12), epoch


WITH_PHASES = [case for case in GOLDEN if case["phases"]]  # none are stated of a short cycle alone


@pytest.mark.parametrize("golden", WITH_PHASES, ids=[case["name"] for case in WITH_PHASES])
def test_phases_slots_and_batch_norm(golden: dict[str, Any]) -> None:
    ours = plan_to_json(planned(golden), gpus=golden["base"]["gpus"])
    assert only(ours["phases"], golden["phases"]) == golden["phases"]
