"""Training steps with a non-finite loss or gradients, also with the gradient scaler of fp16, or out of memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from training import tiny_plan

from mgvideo.engine.optimizers import lamb, sgd
from mgvideo.engine.precision import Normalize, Precision
from mgvideo.engine.tasks import SingleLabel
from mgvideo.engine.train_step import TrainStep
from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.loading.loader import Batch
from mgvideo.plan.plan import Plan
from mgvideo.plan.shards import shard_batch


class ScaledFloat32(Precision):
    """Uses the gradient scaler of fp16 on a network in float32, so that results can be compared."""

    def autocast(self) -> AbstractContextManager:
        return nullcontext()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "fused": lambda model: sgd(model, 0.1),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), 0.1, foreach=True),
    "lamb": lambda model: lamb(model, 0.1),
}


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv3d(3, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 8),
    ]
    return convert_group_batchnorm(nn.Sequential(*layers))


def make_train_step(
    optimizer: str, dtype: torch.dtype | None, plan: Plan, micro_batch_clips: int = 1000, **options: float
) -> TrainStep:
    model = network()
    return TrainStep(
        model, plan, SingleLabel(), OPTIMIZERS[optimizer](model), seed=0,
        normalize=Normalize((0.45,) * 3, (0.225,) * 3),
        precision=ScaledFloat32(torch.device("cpu"), dtype, False, "a test"),
        micro_batch_clips=micro_batch_clips, **options,
    )  # fmt: skip


def batch(plan: Plan, step: int) -> Batch:
    slot, generator = plan.slot(step), torch.Generator().manual_seed(step)
    clips = torch.randint(256, (slot.batch, slot.grid.frames, slot.grid.size, slot.grid.size, 3), generator=generator)
    labels = torch.randint(8, (slot.batch,), generator=generator)
    shard = shard_batch(slot.batch, plan.phase(step).bn_groups, 0, 1)
    return Batch(clips.to(torch.uint8), labels, torch.arange(slot.batch), shard=shard)


def parameters(train_step: TrainStep) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in train_step.model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overflowing_steps_of_fp16_are_skipped_without_any_effect(optimizer: str) -> None:
    plan = tiny_plan("baseline", epochs=3)
    options = {"clip_grad_norm": 4.0, "ema": 0.5}
    scaled, plain = (make_train_step(optimizer, dtype, plan, **options) for dtype in (torch.float16, None))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    for train_step in (scaled, plain):
        train_step.task = SimpleNamespace(loss=lambda *args: 64 * SingleLabel().loss(*args))  # type: ignore[assignment]
    taken = []
    for step in range(12):
        before = parameters(scaled)
        scaled(step, batch(plan, step))
        taken.append(not equal(parameters(scaled), before))
        if taken[-1]:
            plain(step, batch(plan, step))
    assert not taken[0], "the first step overflows"
    assert any(taken[:6])
    assert not all(taken[taken.index(True) :]), "the scale grows until a step overflows again"
    assert equal(parameters(scaled), parameters(plain))
    assert scaled.ema is not None
    assert plain.ema is not None
    assert equal(list(scaled.ema.model.parameters()), list(plain.ema.model.parameters()))
    states = [s.optimizer.state_dict()["state"] for s in (scaled, plain)]
    for number, entry in states[1].items():
        assert all(torch.equal(states[0][number][key], value) for key, value in entry.items())
    assert int(scaled.bad_step) == -1


@pytest.mark.parametrize("micro_batch_clips", [1000, 8])
def test_gradients_of_the_whole_step_are_clipped_to_a_norm(micro_batch_clips: int) -> None:
    plan = tiny_plan("baseline", batch_size=16)
    plain, clipped, loose = (
        make_train_step("fused", None, plan, micro_batch_clips, **options)
        for options in ({}, {"clip_grad_norm": 0.1}, {"clip_grad_norm": 1e6})
    )
    for train_step in (plain, clipped, loose):
        for group in train_step.optimizer.param_groups:
            group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
        before = parameters(train_step)
        train_step(0, batch(plan, 0))
    norm, clipped_norm = (
        torch.cat([(b - a).flatten() for a, b in zip(before, parameters(train_step), strict=True)]).norm() / plan.lr(0)
        for train_step in (plain, clipped)
    )
    torch.testing.assert_close(plain.grad_norm, norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(clipped.grad_norm, plain.grad_norm)
    assert norm > 0.2
    assert clipped_norm.item() == pytest.approx(0.1, rel=1e-3)
    assert equal(parameters(loose), parameters(plain))


def test_gradients_that_overflow_at_any_scale_end_the_run() -> None:
    plan = tiny_plan("baseline", epochs=3)
    scaled = make_train_step("fused", torch.float16, plan)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = scaled.task.loss
    scaled.task.loss = lambda logits, labels: loss(InfiniteGradient.apply(logits), labels)  # type: ignore[method-assign]
    before = parameters(scaled)
    for step in range(6):
        scaled(step, batch(plan, step))
    assert int(scaled.bad_step) == 3, "the scales are 8, 4, 2 and 1"
    assert equal(parameters(scaled), before)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_stay_unchanged_from_the_first_non_finite_loss_on(optimizer: str, dtype: torch.dtype | None) -> None:
    plan = tiny_plan("baseline", epochs=3)
    train_step = make_train_step(optimizer, dtype, plan)
    train_step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=dtype is not None)
    loss, factors = train_step.task.loss, iter([1, 1, float("inf"), 1, 1])
    train_step.task.loss = lambda logits, labels: loss(logits, labels) * next(factors)  # type: ignore[method-assign]
    after_steps = []
    for step in range(5):
        train_step(step, batch(plan, step))
        after_steps.append(parameters(train_step))
    assert int(train_step.bad_step) == 2
    assert not equal(after_steps[0], after_steps[1])
    assert equal(after_steps[1], after_steps[2])
    assert equal(after_steps[1], after_steps[4])


def out_of_memory_message(plan: Plan, micro_batch_clips: int) -> str:
    """Return the error message of a first step that allocates more memory than there is."""
    train_step = make_train_step("fused", None, plan, micro_batch_clips)
    train_step.task = SimpleNamespace(loss=lambda *_: torch.empty(2**50))  # type: ignore[assignment]
    with pytest.raises(UserError) as error:
        train_step(0, batch(plan, 0))
    (line,) = str(error.value).splitlines()
    return line


def test_an_out_of_memory_error_names_the_key_and_a_value_that_fits() -> None:
    plan = tiny_plan("long", batch_size=16)
    slot, base = plan.slot(0), plan.base
    assert slot.batch == 128
    grid = f"{slot.grid.frames}×{slot.grid.size}²"
    value, line = 1000, out_of_memory_message(plan, 1000)
    assert line.startswith(f"out of memory at step 0 (phase 1, {grid}), where this rank runs 128 clips at once: ")
    tried_values = []
    while "try train.micro_batch_clips=" in line:
        clips = int(line.split("runs ")[1].split()[0])
        lower = int(line.split("train.micro_batch_clips=")[1].split()[0])
        assert f"(now {value})" in line
        assert lower == 1 or lower * base.num_frames * base.crop_size**2 // slot.grid.volume <= clips // 2
        value, line = lower, out_of_memory_message(plan, lower)
        tried_values.append(value)
    assert tried_values[-1] == 1
    assert "choose a smaller model, base.crop_size or base.num_frames" in line


def test_other_errors_of_a_step_are_not_changed() -> None:
    plan = tiny_plan("baseline")
    train_step = make_train_step("fused", None, plan)
    train_step.task = SimpleNamespace(loss=lambda logits, labels: logits @ labels)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"addmv|expected scalar type"):
        train_step(0, batch(plan, 0))
