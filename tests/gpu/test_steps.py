"""Compare an optimizer step of every network family at every slot with the same step in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_plan
from mgvideo.engine.optimizers import adamw, lamb, sgd
from mgvideo.engine.precision import Normalize, Precision
from mgvideo.engine.tasks import SingleLabel
from mgvideo.engine.train_step import TrainStep
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.layers.dropout import convert_clip_dropout
from mgvideo.loading.loader import Batch
from mgvideo.plan.plan import Plan
from mgvideo.plan.shards import shard_batch

# Relative error of all gradients together, with GELU in place of ReLU. Measured on a CPU: in float32 4e-5, or 7e-4 if
# a rounding error changes which frame max pooling takes; in bf16 0.07. With non-local blocks 2.3e-3 and 0.14.
MAX_ERROR = {None: 2e-3, torch.bfloat16: 0.12}
MAX_NON_LOCAL_ERROR = {None: 1e-2, torch.bfloat16: 0.25}
FAMILIES = (
    *("slowfast_small", "i3d_small", "i3d_nln_small", "r2plus1d_small"),
    *("x3d_small", "mvit_small", "vit_small"),
)
CLASSES = 8
DATASET_SIZE = 1000


def make_plan(model: str, batch: int = 16) -> Plan:
    """Return the multigrid plan of the embedded recipe."""
    return build_plan(compose_config("run", [f"model={model}", f"base.batch_size={batch}"]), DATASET_SIZE)


def steps_by_slot(plan: Plan) -> dict[str, int]:
    """Return one step for each combination of grid and BN groups, by name."""
    steps: dict[str, int] = {}
    for phase in plan.phases:
        for offset, slot in enumerate(phase.slots[: phase.num_steps]):
            steps.setdefault(f"{slot.grid.name} in {phase.bn_groups} groups", phase.steps[0] + offset)
    return steps


def make_train_step(
    model: str,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype | None,
    double: bool = False,
    build_optimizer: Callable[..., Optimizer] = sgd,
    **options: object,
) -> TrainStep:
    """Return a train step of a network with the same weights on every device, all branches active and no dropout.

    GELU replaces ReLU: where the input of a ReLU is near 0, a rounding error turns a gradient on or off, which changes
    all gradients of such small networks by 1e-3.
    """
    from hydra.utils import instantiate

    cfg = compose_config("run", [f"model={model}", f"dataset.num_classes={CLASSES}"])
    torch.manual_seed(0)
    network: nn.Module = convert_clip_dropout(convert_group_batchnorm(instantiate(cfg.model)))
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
        if isinstance(module, nn.BatchNorm3d):  # a zero weight in the last layer of a branch would disable the branch
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Dropout):  # masks differ between devices
            module.p = 0.0
    precision = Precision(device, dtype, dtype is not None, "a test")
    normalize = Normalize((0.45,) * 3, (0.225,) * 3, torch.float64 if double else torch.float32).to(device)
    network = network.double() if double else precision.place(network)
    settings = {"micro_batch_clips": 10**6, "compile": "off", **options}
    return TrainStep(
        network, plan, SingleLabel(), build_optimizer(network, 0.1), seed=0, normalize=normalize, precision=precision,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def make_batch(plan: Plan, step: int, device: torch.device) -> Batch:
    """Return the batch of a step with random pixels, the same on every device."""
    phase, slot = plan.phase(step), plan.slot(step)
    draw = torch.Generator().manual_seed(step)
    shape = (slot.batch, slot.grid.frames, slot.grid.size, slot.grid.size, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (slot.batch,), generator=draw)
    pinned = clips.pin_memory() if device.type == "cuda" else clips
    return Batch(pinned, labels, torch.arange(slot.batch), shard=shard_batch(slot.batch, phase.bn_groups, 0, 1))


class StepResult(NamedTuple):
    """Loss, gradients, running statistics and weights after a step, flat and in float64 on the CPU."""

    loss: Tensor
    gradients: Tensor
    running: Tensor
    weights: Tensor


def take_step(train_step: TrainStep, step: int, batch: Batch) -> StepResult:
    """Take a step and assert that it is finite."""
    loss = train_step(step, batch)
    assert int(train_step.bad_step) < 0, "loss or gradients are not finite"
    model = train_step.model
    running = [buffer for name, buffer in model.named_buffers() if "running" in name]
    return StepResult(
        loss.double().cpu(), _flat([p.grad for p in model.parameters()]), _flat(running), _flat(model.parameters())
    )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(tensor.detach().double().cpu().flatten() for tensor in tensors)])


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected tensor, 0 if both are empty."""
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm()) if expected.numel() else 0.0


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32 inside the block."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def reference_step(model: str, plan: Plan, step: int) -> StepResult:
    """Take the step in float64 on the CPU."""
    cpu = torch.device("cpu")
    return take_step(make_train_step(model, plan, cpu, None, double=True), step, make_batch(plan, step, cpu))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_step_of_every_slot_equals_float64(model: str, device: torch.device) -> None:
    plan = make_plan(model)
    steps = steps_by_slot(plan)
    assert len(steps) >= 4
    for name, step in steps.items():
        expected = reference_step(model, plan, step)
        for dtype, limit in (MAX_NON_LOCAL_ERROR if "nln" in model else MAX_ERROR).items():
            with exact_float32():
                actual = take_step(make_train_step(model, plan, device, dtype), step, make_batch(plan, step, device))
            where = f"{model} at {name} in {dtype}"
            assert error(actual.gradients, expected.gradients) < limit, where
            assert error(actual.loss, expected.loss) < limit, where
            assert error(actual.running, expected.running) < limit, where
            assert error(actual.weights, expected.weights) < limit, where


def test_micro_batches_give_the_same_step_as_the_whole_batch(device: torch.device) -> None:
    plan = make_plan("slowfast_small")
    step = max(steps_by_slot(plan).values(), key=lambda step: plan.phase(step).bn_groups)
    batch = make_batch(plan, step, device)
    with exact_float32():
        whole, parts = (
            take_step(make_train_step("slowfast_small", plan, device, None, micro_batch_clips=clips), step, batch)
            for clips in (10**6, 4)
        )
    assert error(parts.gradients, whole.gradients) < MAX_ERROR[None]
    assert error(parts.running, whole.running) < MAX_ERROR[None]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_equal_eager_ones(mode: str, cuda: torch.device) -> None:
    plan = make_plan("slowfast_small")
    step = max(steps_by_slot(plan).values(), key=lambda step: plan.phase(step).bn_groups)
    batch = make_batch(plan, step, cuda)
    eager, compiled = (make_train_step("slowfast_small", plan, cuda, torch.bfloat16, compile=m) for m in ("off", mode))
    for _ in range(3):  # the third replays a CUDA graph
        expected, actual = take_step(eager, step, batch), take_step(compiled, step, batch)
    assert error(actual.gradients, expected.gradients) < MAX_ERROR[torch.bfloat16]
    assert error(actual.running, expected.running) < MAX_ERROR[torch.bfloat16]


@pytest.mark.parametrize("build_optimizer", [sgd, adamw, lamb])
def test_an_overflow_in_fp16_skips_the_step_and_training_continues(
    build_optimizer: Callable[..., Optimizer], cuda: torch.device
) -> None:
    plan = make_plan("slowfast_small")
    step = plan.phases[-1].steps[0]
    options = {"build_optimizer": build_optimizer, "clip_grad_norm": 1.0, "ema": 0.9}
    train_step = make_train_step("slowfast_small", plan, cuda, torch.float16, **options)  # type: ignore[arg-type]
    train_step.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = _flat(train_step.model.parameters())
    train_step(step, make_batch(plan, step, cuda))
    assert train_step.ema is not None
    for model in (train_step.model, train_step.ema.model):
        assert torch.equal(_flat(model.parameters()), before), "the first step overflows and must be skipped"
    for _ in range(40):
        train_step(step, make_batch(plan, step, cuda))
    after = _flat(train_step.model.parameters())
    assert int(train_step.bad_step) < 0
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    averages = _flat(train_step.ema.model.parameters())
    assert 0 < error(averages, after) < error(before, after)
    states = [value for state in train_step.optimizer.state.values() for value in state.values()]
    assert all(bool(torch.isfinite(value).all()) for value in states)
