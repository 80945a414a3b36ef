"""Skipped steps leave parameters and state of any optimizer unchanged; loaded state gets the parameter's layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from mgvideo.engine.lamb import Lamb
from mgvideo.engine.optimizers import adamw, lamb, parameter_groups, sgd
from mgvideo.engine.skippable_step import SkippableStep, load_optimizer_state
from mgvideo.errors import UserError


class CustomAdam(Optimizer):
    """A typical custom Adam: counts steps in Python, creates state in its steps, and cannot skip a step."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * parameter.grad  # a new tensor in each step
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(state["mean"] / (1 - 0.9 ** state["step"]), alpha=group["lr"])


class CountsInGroup(CustomAdam):
    """Keeps its step count in the parameter group, as a setting."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / group["step"])


class OverriddenSGD(SGD):
    """Runs torch's fused step, then changes the parameters further."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)


MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "the recipes'": lambda m: sgd(m, 0.1, weight_decay=0.1),
    "adamw": lambda m: adamw(m, 0.1),
    "lamb": lambda m: lamb(m, 0.1),
    "SGD fused": lambda m: SGD(m.parameters(), **MOMENTUM, nesterov=True, fused=True),
    "SGD fused, plain": lambda m: SGD(m.parameters(), 0.1, fused=True),
    "SGD fused, dampening": lambda m: SGD(m.parameters(), **MOMENTUM, dampening=0.5, fused=True),
    "SGD foreach": lambda m: SGD(m.parameters(), **MOMENTUM, foreach=True),
    "SGD foreach, dampening": lambda m: SGD(m.parameters(), **MOMENTUM, dampening=0.5, foreach=True),
    "SGD for": lambda m: SGD(m.parameters(), **MOMENTUM, foreach=False),
    "SGD overridden": lambda m: OverriddenSGD(m.parameters(), **MOMENTUM, fused=True),
    "AdamW fused": lambda m: AdamW(m.parameters(), 0.1, fused=True),
    "AdamW foreach": lambda m: AdamW(m.parameters(), 0.1, foreach=True),
    "Adam for": lambda m: Adam(m.parameters(), 0.1, foreach=False, amsgrad=True),
    "Adagrad fused": lambda m: Adagrad(m.parameters(), 0.1, fused=True),
    "RMSprop": lambda m: RMSprop(m.parameters(), 0.1, momentum=0.9),
    "custom": lambda m: CustomAdam(m.parameters(), 0.1),
    "counts in group": lambda m: CountsInGroup(m.parameters(), 0.1),
}
FUSED = {name for name in OPTIMIZERS if "fused" in name and "dampening" not in name} | {"the recipes'", "adamw", "lamb"}


class SyncCounter(TorchDispatchMode):
    """Counts how often the host reads a value of the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.Linear(3, 5))


def set_gradients(model: nn.Module, step: int, bad: bool = False) -> None:
    """Set random gradients that depend on the step; with `bad`, one has a NaN."""
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if bad and i == 1:
            parameter.grad[0] = float("nan")


def contents(model: nn.Module, optimizer: Optimizer) -> dict[str, object]:
    """Return parameters, state and step counts by name."""
    state = {(i, k): v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}
    numbers = {(i, k): v for i, group in enumerate(optimizer.param_groups) for k, v in group.items() if k == "step"}
    return {**{k: v.clone() for k, v in model.state_dict().items()}, **state, **numbers}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


def tensors(values: dict) -> dict:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("skips", [(1, 0, 0, 1, 1, 0), (1, 1, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps_have_no_effect_on_later_steps(
    name: str, skips: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan_like(tensor: Tensor, **options: object) -> Tensor:
        return torch.full_like(tensor, float("nan"), **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty_like", nan_like)  # the worst content of uninitialised memory
    skipping, plain = network(), network()
    optimizers = OPTIMIZERS[name](skipping), OPTIMIZERS[name](plain)
    step = SkippableStep(optimizers[0], continues=True)
    for number, skip in enumerate(skips):
        set_gradients(skipping, number, bad=bool(skip))
        step(torch.tensor(bool(skip)))
        if not skip:
            set_gradients(plain, number)
            optimizers[1].step()
    after, expected = contents(skipping, optimizers[0]), contents(plain, optimizers[1])
    assert_same(after, expected)
    assert all(v.isfinite().all() for v in after.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("good", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_stay_unchanged_from_the_first_bad_step_on_without_waiting_for_the_device(
    name: str, good: int
) -> None:
    model, plain = network(), network()
    optimizer, unguarded = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    step = SkippableStep(optimizer, continues=False)
    for number in range(good):
        set_gradients(model, number)
        step(torch.tensor(False))
    before, skip = contents(model, optimizer), torch.tensor(True)
    with SyncCounter() as syncs:
        for number in range(good, good + 3):
            set_gradients(model, number, bad=number == good)
            step(skip)
    after = contents(model, optimizer)
    assert_same({key: after[key] for key in tensors(before)}, tensors(before))
    with SyncCounter() as unguarded_syncs:
        for number in range(good + 3):
            set_gradients(plain, number)
            unguarded.step()
    # Some of torch's optimizers read their step count, which on GPUs is on the host.
    assert syncs.count <= unguarded_syncs.count
    assert syncs.count == 0 or name not in FUSED


@pytest.mark.parametrize("name", ["SGD foreach", "AdamW foreach", "SGD overridden", "RMSprop"])
def test_state_on_the_device_is_restored_without_reading_it(name: str) -> None:
    model = network()
    step = SkippableStep(OPTIMIZERS[name](model), continues=True)
    with SyncCounter() as first:
        set_gradients(model, 0)
        step(torch.tensor(False))
    assert first.count > 0, "this step creates state, so the host reads `skip`"
    plain = network()
    set_gradients(plain, 0)
    optimizer = OPTIMIZERS[name](plain)
    optimizer.step()
    with SyncCounter() as unguarded:
        set_gradients(plain, 1)
        optimizer.step()
    with SyncCounter() as guarded:
        set_gradients(model, 1, bad=True)
        step(torch.tensor(True))
    assert guarded.count == unguarded.count


@pytest.mark.parametrize("name", ["the recipes'", "AdamW fused", "AdamW foreach", "lamb"])
def test_loaded_state_has_the_layout_of_its_parameter(name: str) -> None:
    saved, resumed, reference = network(), network(), network()
    saved.to(memory_format=torch.channels_last_3d)
    optimizers = [OPTIMIZERS[name](model) for model in (saved, resumed, reference)]
    for model, optimizer in zip((saved, reference), (optimizers[0], optimizers[2]), strict=True):
        set_gradients(model, 0)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        optimizer.step()
    resumed.load_state_dict(saved.state_dict())
    optimizers[1].param_groups[0]["weight_decay"] = optimizers[2].param_groups[0]["weight_decay"] = 0.3
    load_optimizer_state(optimizers[1], optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["weight_decay"] == 0.3, "settings are not loaded"
    for parameter, state in optimizers[1].state.items():
        for value in state.values():
            assert value.dim() == 0 or value.stride() == parameter.stride()
    for model, optimizer in zip((resumed, reference), optimizers[1:], strict=True):
        set_gradients(model, 1)
        optimizer.step()
    for a, b in zip(resumed.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Transformer(nn.Module):
    """Parameters like a transformer's: a position table, a stem, blocks and a head, with their depths."""

    no_weight_decay = ("positions", "blocks.*.table")

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.ones(1, 4, 3))
        self.stem = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        for block in self.blocks:
            block.table = nn.Parameter(torch.ones(2, 3))
        self.head = nn.Linear(3, 2)

    def parameter_depths(self) -> dict[str, int]:
        depths = {"positions": 0, "stem": 0, "blocks.0": 1, "blocks.1": 2, "head": 3}
        return {name: next(d for p, d in depths.items() if name.startswith(p)) for name, _ in self.named_parameters()}


def names_of(model: nn.Module, groups: list[dict]) -> dict[tuple[float, float], set[str]]:
    """Return the names of the parameters by LR factor and weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {(g["lr_scale"], g["weight_decay"]): {names[p] for p in g["params"]} for g in groups}


def test_norms_biases_and_position_tables_have_no_weight_decay() -> None:
    model = nn.Sequential(Transformer(), nn.BatchNorm3d(2))
    decayed = {f"0.{name}.weight" for name in ("stem", "blocks.0", "blocks.1", "head")}
    groups = names_of(model, parameter_groups(model, 0.1, False))
    assert groups == {(1, 0.1): decayed, (1, 0): {name for name, _ in model.named_parameters()} - decayed}
    assert names_of(model, parameter_groups(model, 0.1, True)) == {(1, 0.1): {n for n, _ in model.named_parameters()}}


def test_layer_decay_multiplies_the_lr_by_depth() -> None:
    model = Transformer()
    model.stem.requires_grad_(False)
    groups = names_of(model, adamw(model, 1.0, layer_decay=0.5).param_groups)
    assert groups[1 / 2, 0.05] == {"blocks.1.weight"}
    assert groups[1 / 2, 0] == {"blocks.1.bias", "blocks.1.table"}
    assert groups[1 / 8, 0] == {"positions"}
    assert {scale for scale, _ in groups} == {1, 1 / 2, 1 / 4, 1 / 8}
    assert not any(name.startswith("stem") for names in groups.values() for name in names)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: adamw(m, 0.1, layer_decay=0.5), r"layer_decay=0\.5: Sequential does not define the depths"),
        (lambda m: adamw(Transformer(), 0.1, layer_decay=1.5), r"layer_decay=1\.5: give"),
        (lambda m: adamw(m, 0.1, betas=[0.9]), r"betas=\[0\.9\]: give two numbers"),
        (lambda m: lamb(m, 0.1, betas="x"), r"betas=x: give two numbers"),
        (lambda m: lamb(m, 0.1, eps=0), r"eps=0: give a number above 0"),
        (lambda m: sgd(m.requires_grad_(False), 0.1), r"leaves no parameters to train"),
    ],
)
def test_invalid_values_are_named(build: Callable[[nn.Module], Optimizer], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(network())


def test_lamb_takes_the_steps_of_the_paper() -> None:
    """Compare with algorithm 2 of arXiv 1904.00962, written for one weight in float64."""
    model = network().double()
    optimizer = lamb(model, lr=0.01, weight_decay=0.1)
    expected = [p.detach().clone() for p in model.parameters()]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for step in range(1, 4):
        set_gradients(model, step)
        for i, (w, p) in enumerate(zip(expected, model.parameters(), strict=True)):
            gradient = p.grad
            assert gradient is not None
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            ratio = means[i] / (1 - 0.9**step) / ((squares[i] / (1 - 0.999**step)).sqrt() + 1e-6)
            if w.dim() > 1:
                ratio += 0.1 * w
                ratio *= w.norm() / ratio.norm()
            w.sub_(0.01 * ratio)
        optimizer.step()
    for w, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=1e-9, atol=1e-12)


def test_lamb_steps_a_weight_of_zeros() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lamb([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))
