"""Runs of schedules beyond the paper: branches of a cooldown, a finish, and exact resume of drawn grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training import TINY, end_state, metrics, run_program

from mgvideo.storage.checkpoints import read_checkpoint

SHORT = [
    *(word for word in TINY if not word.startswith("base.lr_milestones")),
    *("base.lr_milestones=[1]", "precision=fp32", "deterministic=true", "test.enable=false", "train.evals_per_phase=0"),
    *("loader.num_workers=0", "train.log_every=1"),
]


def run(folder: Path, motion_root: str, *overrides: str, code: int = 0) -> str:
    """Run the program with these overrides; return what it printed, or for another exit code its error."""
    result = run_program(*SHORT, f"dataset.root={motion_root}", *overrides, cwd=folder)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of a whole cooldown run with a checkpoint at every second step."""
    folder = tmp_path_factory.mktemp("cooldown")
    options = ["schedule=cooldown", "base.epochs=6", "checkpoint.every_steps=2", "checkpoint.keep=100"]
    run(folder, motion_root, *options, "output_dir=trunk")
    return folder


def test_a_cooldown_branches_from_a_checkpoint(trunk: Path, motion_root: str) -> None:
    checkpoint = trunk / "trunk/checkpoints/step_00000008.pt"
    branch = ["schedule=cooldown", "base.epochs=6", f"resume={checkpoint}", "schedule.decay_from=now"]
    printed = run(trunk, motion_root, *branch, "output_dir=branch")
    assert "resumed at step 8 of 10" in printed
    plan = json.loads((trunk / "branch/plan.json").read_text())
    assert [phase["steps"] for phase in plan["phases"]][-1] == [8, 10]
    rates = metrics(trunk / "branch", "lr")
    assert list(rates) == [9, 10]
    assert rates[9] == 0.05 > rates[10] > 0
    assert max(metrics(trunk / "trunk")) > 10
    # The same command, stopped and continued, ends with the same weights.
    stopped = ["schedule=cooldown", "base.epochs=6", "resume=auto", "schedule.decay_from=8", "output_dir=branch"]
    before = end_state(trunk / "branch")
    (trunk / "branch/checkpoints/step_00000010.pt").unlink()
    run(trunk, motion_root, *stopped, f"resume={checkpoint}")
    assert end_state(trunk / "branch") == before
    assert "continues" not in run(trunk, motion_root, *stopped)


def test_a_branch_from_another_plan_or_from_nowhere_is_refused(trunk: Path, motion_root: str) -> None:
    late = sorted((trunk / "trunk/checkpoints").glob("step_*.pt"))[-1]
    now = ["schedule=cooldown", "schedule.decay_from=now", "output_dir=refused"]
    error = run(trunk, motion_root, *now, "base.epochs=6", f"resume={late}", code=2)
    assert "the constant part of this plan is steps 1 to" in error
    error = run(trunk, motion_root, *now, "base.epochs=6", code=2)
    assert "schedule.decay_from=now: add resume=PATH" in error
    early = trunk / "trunk/checkpoints/step_00000008.pt"
    error = run(trunk, motion_root, *now, "base.epochs=12", f"resume={early}", code=2)
    assert "base.epochs was 6.0, is 12.0" in error
    assert len(error.splitlines()) == 1


def test_a_finish_of_the_head_trains_head_and_norms_alone(tmp_path: Path, motion_root: str) -> None:
    options = ["schedule=monotone", "schedule.finish=head", "test.crop_size=40", "checkpoint.keep=100", "base.epochs=1"]
    run(tmp_path, motion_root, *options, "base.lr_milestones=[]", "schedule.finish_lr=1", "output_dir=out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    first, stop = plan["phases"][-1]["steps"]
    assert (plan["phases"][-1]["trains"], plan["phases"][-1]["grid"]["size"]) == ("head", 40)
    before, after = (
        read_checkpoint(tmp_path / f"out/checkpoints/step_{step:08d}.pt")["model"] for step in (first, stop)
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    convolutions = {name for name, value in before.items() if value.dim() == 5}
    assert convolutions
    assert not changed & convolutions
    trained = {name for name in changed if name.endswith((".weight", ".bias"))}
    assert len(trained) > len(before.keys() & {n for n in before if n.endswith("running_mean")})
    assert {name for name, value in before.items() if value.dim() == 2} <= changed  # the head's weights


def test_drawn_grids_resume_exactly(tmp_path: Path, motion_root: str) -> None:
    options = ["schedule=random", "schedule.strength=volume", "schedule.budget=0.6", "checkpoint.every_steps=2"]
    options += ["checkpoint.keep=100", "train.micro_batch_clips=4", "model.dropout=0.3"]
    run(tmp_path, motion_root, *options, "output_dir=whole")
    whole = end_state(tmp_path / "whole")
    grids = metrics(tmp_path / "whole", "grid")
    assert len(set(grids.values())) > 1
    middle = tmp_path / "whole/checkpoints/step_00000004.pt"
    run(tmp_path, motion_root, *options, f"resume={middle}", "output_dir=second")
    assert end_state(tmp_path / "second") == whole
    assert metrics(tmp_path / "second", "grid") == {step: grid for step, grid in grids.items() if step > 4}
