"""A trial forward pass in training mode, which finds layers that depend on the number of ranks or micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import GroupBatchNorm3d
from mgvideo.layers.dropout import ClipMask, dropout_of
from mgvideo.plan.plan import Grid

from .precision import without_tuning

CLIPS = 5  # divides few usual numbers of frames or tokens, so that a first dimension that is not the clips shows
LAYERS = 'nn.Dropout as a layer, and torchvision.ops.StochasticDepth(p, mode="row") for drop path'
RANDOM = "draws random numbers ({}) that depend on ranks and micro-batches: use " + LAYERS
STATISTICS = "normalises by the statistics of a micro-batch ({}): use nn.BatchNorm3d, nn.LayerNorm or nn.GroupNorm"
BUFFER = "changes its buffer {} in training, on each rank by itself: only nn.BatchNorm3d may"
# those that have no argument `training`
STATISTICS_OPS = ("batch_norm_stats", "batch_norm_update_stats", "_batch_norm_with_update")


def check_forward(model: nn.Module, grid: Grid, device: torch.device) -> None:
    """Refuse a network in whose training something depends on the number of ranks or micro-batches.

    Runs one forward pass of five clips of `grid` on the model as `convert_clip_dropout` and `convert_group_batchnorm`
    return it. Looks for random numbers and batch statistics outside the converted layers, and for buffers that change.
    Leaves weights, buffers and random generators as they are. Does not see what this forward pass does not do (a branch
    that is rarely taken, or taken at other grids only), what runs inside compiled code, or attributes that are not
    buffers.

    Raises:
        UserError: the layers at fault, by name, and what to use instead.
    """
    dtype, training = next(model.parameters()).dtype, model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    watch = _LayerRecorder()
    with _generators_restored(device), without_tuning(), torch.no_grad():
        clips = torch.randn(CLIPS, grid.frames, grid.size, grid.size, 3, dtype=dtype, device=device)
        model.train()
        try:
            with _layers_watched(model, watch), dropout_of(model, CLIPS, 0, CLIPS), watch:
                model(clips.permute(0, 4, 1, 2, 3))
            _find_changed_buffers(model, buffers, watch)
        except UserError as error:
            raise UserError(f"model: {_name(*watch.entered)}: {error}") from error
        finally:
            model.train(training)
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
    if watch.faults:
        first, *others = watch.faults
        more = f"; the same or similar in {', '.join(others[:5])}{', …' if others[5:] else ''}" if others else ""
        raise UserError(f"model: {first} {watch.faults[first]}{more}")


class _LayerRecorder(TorchDispatchMode):
    """Collects faults by the name of the layer in which an operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[str, nn.Module]] = []  # whose forward runs, the innermost last
        self.entered: tuple[str, nn.Module]  # the last of all
        self.faults: dict[str, str] = {}

    def add(self, layer: tuple[str, nn.Module], fault: str) -> None:
        """Record the first fault of a layer."""
        self.faults.setdefault(_name(*layer), fault)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layers:
            values = _arguments(func, args, kwargs or {})
            name = func._schema.name.partition("::")[2]
            if _is_random(func, values) and not isinstance(self.layers[-1][1], ClipMask):
                self.add(self.layers[-1], RANDOM.format(name))
            elif _has_batch_statistics(name, values) and not isinstance(self.layers[-1][1], GroupBatchNorm3d):
                self.add(self.layers[-1], STATISTICS.format(name))
        return func(*args, **(kwargs or {}))


def _name(name: str, module: nn.Module) -> str:
    return f"{name or 'the network itself'} ({type(module).__name__})"


def _arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The values of an operation's arguments by name, defaults included."""
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return {**defaults, **{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}


def _is_random(func: Any, values: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers. Attention and RNNs do where their dropout is above 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags or values.get("train", values.get("training")) is False:
        return False
    chances = [values[name] for name in ("dropout_p", "dropout", "p") if name in values]
    return not chances or any(isinstance(chance, Tensor) or chance for chance in chances)


def _has_batch_statistics(name: str, values: dict[str, Any]) -> bool:
    """Whether an operation is batch norm in training. With one row it is instance norm, or standardises weights."""
    return "batch_norm" in name and values.get("training", name in STATISTICS_OPS) and values["input"].shape[0] > 1


@contextmanager
def _layers_watched(model: nn.Module, watch: _LayerRecorder) -> Iterator[None]:
    """Inside, `watch.layers` is current, and layers that use Python's or NumPy's global generator are recorded."""
    states: list[Any] = []

    def enter(layer: tuple[str, nn.Module]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            watch.entered = layer
            watch.layers.append(layer)
            states.append(_host_generators())

        return hook

    def leave(*_: Any) -> None:
        layer, now = watch.layers.pop(), _host_generators()
        if states.pop() != now:
            watch.add(layer, RANDOM.format("of Python or NumPy"))
            states[:] = [now] * len(states)  # the layers around it are not at fault

    with ExitStack() as stack:
        for layer in model.named_modules():
            stack.callback(layer[1].register_forward_pre_hook(enter(layer)).remove)
            stack.callback(layer[1].register_forward_hook(leave, always_call=True).remove)
        yield


def _host_generators() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), bytes(keys), position  # type: ignore[arg-type]


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Leave all global random generators as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _find_changed_buffers(model: nn.Module, before: dict[str, Tensor], watch: _LayerRecorder) -> None:
    """Record layers whose buffers have other values. A buffer of another shape is a table for the grid."""
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            old = before.get(f"{name}.{own}" if name else own)
            if isinstance(module, GroupBatchNorm3d) or old is None or old.shape != buffer.shape:
                continue
            if not torch.equal(old, buffer):
                watch.add((name, module), BUFFER.format(own))
