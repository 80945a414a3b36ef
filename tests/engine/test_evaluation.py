"""Precise BN as the trainer runs it: which clips, how many, and the state after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training import BASE, KNOBS, tiny_plan, tiny_trainer

from mgvideo.distributed.signals import Stopped
from mgvideo.engine import evaluation
from mgvideo.engine.trainer import Trainer
from mgvideo.layers.dropout import ClipDropout
from mgvideo.loading.requests import ClipRequest, Sample
from mgvideo.plan.schedules import Schedule, baseline_of, make_plan


class RecordingDataset:
    """A dataset that records the requests for its clips. It replaces the dataset of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.dataset, self.requests = trainer.loader.dataset, list[ClipRequest]()
        trainer.loader.dataset = self

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        self.requests.append(request)
        return self.dataset[request]


@pytest.mark.parametrize(("clips", "read"), [(0, 0), (1, 8), (16, 16), (23, 16), (10_000, KNOBS.train)])
def test_precise_bn_reads_its_number_of_clips_in_whole_batches(
    tmp_path: Path, motion_root: str, clips: int, read: int
) -> None:
    plan = tiny_plan()
    trainer = tiny_trainer(tmp_path, motion_root, plan, precise_bn_clips=clips)
    dataset = RecordingDataset(trainer)
    before = {name: value.clone() for name, value in trainer.model.named_buffers() if "running" in name}
    trainer.precise_bn()
    assert len(dataset.requests) == read
    assert len({request.index for request in dataset.requests}) == read, "at most one pass over the videos"
    assert {request.grid for request in dataset.requests} <= {plan.phases[-1].grid}
    changed = [not torch.equal(value, before[name]) for name, value in trainer.model.named_buffers() if name in before]
    assert all(changed) if clips else not any(changed)


def test_each_step_uses_other_clips_and_none_of_training(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan(), precise_bn_clips=16)
    dataset = RecordingDataset(trainer)
    seeds = [{clip.seed for clip in trainer.sampler.shard(step).clips} for step in range(trainer.plan.steps)]
    for step in (0, 1, 1):
        trainer.progress.step = step
        trainer.precise_bn()
        seeds.append({request.seed for request in dataset.requests})
        dataset.requests.clear()
    assert seeds[-1] == seeds[-2], "a resumed run uses the same clips"
    assert len(set().union(*seeds)) == sum(map(len, seeds[:-1]))


def test_statistics_depend_neither_on_micro_batches_nor_on_the_generator(tmp_path: Path, motion_root: str) -> None:
    states = []
    for clips, seed in ((1000, 1), (8, 2)):
        plan = tiny_plan("baseline", batch_size=16)
        trainer = tiny_trainer(tmp_path, motion_root, plan, double=True, micro_batch_clips=clips, precise_bn_clips=32)
        model = nn.Sequential(ClipDropout(0.5), trainer.model)
        trainer.train_step.model = model
        torch.manual_seed(seed)
        trainer.precise_bn()
        states.append({name: value for name, value in model.named_buffers() if "running" in name})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-12)


def test_a_signal_during_precise_bn_leaves_the_statistics_unchanged(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan(), precise_bn_clips=24)
    dataset = RecordingDataset(trainer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def stop_in_the_second_batch() -> None:
        if len(dataset.requests) > 8:
            raise Stopped(15)

    monkeypatch.setattr(evaluation, "raise_if_stopped", stop_in_the_second_batch)
    with pytest.raises(Stopped):
        trainer.precise_bn()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(("group", "groups"), [(4, 8), (8, 4), (16, 2)])
def test_bn_groups_are_as_large_as_in_training(group: int, groups: int) -> None:
    schedule = Schedule("multigrid", True, True, round_epochs=False, min_size=16, bn_group=group)
    plan = make_plan(replace(BASE, batch_size=32), schedule, KNOBS.train)
    assert baseline_of(plan).phases[0].bn_groups == plan.phases[-1].bn_groups == groups
