"""Find layers whose training would depend on the number of ranks or micro-batches, by a trial forward pass."""

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
from mgvideo.layers.dropout import ClipMask, dropout_for_clips
from mgvideo.plan.plan import Grid

from .precision import without_cudnn_benchmark

# Few usual numbers of frames or tokens are multiples of 5, so a first dimension other than the clips is noticed.
NUM_CLIPS = 5
RANDOM_LAYERS = 'nn.Dropout as a layer, and torchvision.ops.StochasticDepth(p, mode="row") for drop path'
RANDOM_MESSAGE = "draws random numbers ({}) that depend on ranks and micro-batches: use " + RANDOM_LAYERS
STATISTICS_MESSAGE = (
    "normalises by the statistics of a micro-batch ({}): use nn.BatchNorm3d, nn.LayerNorm or nn.GroupNorm"
)
BUFFER_MESSAGE = "changes its buffer {} in training, on each rank by itself: only nn.BatchNorm3d may"
# batch norm operations that have no argument `training` and always use the statistics of the batch
BATCH_STATISTICS_OPS = ("batch_norm_stats", "batch_norm_update_stats", "_batch_norm_with_update")


def check_forward(model: nn.Module, grid: Grid, device: torch.device) -> None:
    """Raise an error if a network's training would depend on the number of ranks or micro-batches.

    Runs one forward pass in training mode, of five clips of `grid`, on the model that `convert_clip_dropout` and
    `convert_group_batchnorm` return. Looks for random numbers and batch statistics outside the converted layers, and
    for buffers that change. Leaves weights, buffers and random generators unchanged.

    It cannot find faults in code that this forward pass does not run (a branch that is rarely taken, or only at other
    grids), in compiled code, or in attributes that are not buffers.

    Raises:
        UserError: names the layers at fault and what to use instead.
    """
    dtype, training = next(model.parameters()).dtype, model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recorder = _FaultRecorder()
    with _generators_restored(device), without_cudnn_benchmark(), torch.no_grad():
        clips = torch.randn(NUM_CLIPS, grid.frames, grid.size, grid.size, 3, dtype=dtype, device=device)
        model.train()
        try:
            with _track_layers(model, recorder), dropout_for_clips(model, NUM_CLIPS, 0, NUM_CLIPS), recorder:
                model(clips.permute(0, 4, 1, 2, 3))
            _find_changed_buffers(model, buffers, recorder)
        except UserError as error:
            raise UserError(f"model: {_name(*recorder.last_layer)}: {error}") from error
        finally:
            model.train(training)
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
    if recorder.faults:
        first, *others = recorder.faults
        more = f"; the same or similar in {', '.join(others[:5])}{', …' if others[5:] else ''}" if others else ""
        raise UserError(f"model: {first} {recorder.faults[first]}{more}")


class _FaultRecorder(TorchDispatchMode):
    """Records faulty operations by the name of the layer that runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[str, nn.Module]] = []  # layers whose forward is running, the innermost last
        self.last_layer: tuple[str, nn.Module]  # the layer whose forward started last
        self.faults: dict[str, str] = {}  # message by layer

    def add(self, layer: tuple[str, nn.Module], fault: str) -> None:
        """Record the first fault of a layer."""
        self.faults.setdefault(_name(*layer), fault)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layers:
            values = _arguments(func, args, kwargs or {})
            name = func._schema.name.partition("::")[2]
            if _is_random(func, values) and not isinstance(self.layers[-1][1], ClipMask):
                self.add(self.layers[-1], RANDOM_MESSAGE.format(name))
            elif _has_batch_statistics(name, values) and not isinstance(self.layers[-1][1], GroupBatchNorm3d):
                self.add(self.layers[-1], STATISTICS_MESSAGE.format(name))
        return func(*args, **(kwargs or {}))


def _name(name: str, module: nn.Module) -> str:
    return f"{name or 'the network itself'} ({type(module).__name__})"


def _arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an operation's arguments by name, including defaults."""
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return {**defaults, **{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}


def _is_random(func: Any, values: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers. Attention and RNNs do if their dropout is above 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags or values.get("train", values.get("training")) is False:
        return False
    probabilities = [values[name] for name in ("dropout_p", "dropout", "p") if name in values]
    return not probabilities or any(isinstance(p, Tensor) or p for p in probabilities)


def _has_batch_statistics(name: str, values: dict[str, Any]) -> bool:
    """Whether an operation is batch norm in training. A batch of 1 means instance norm or weight standardisation."""
    uses_batch = values.get("training", name in BATCH_STATISTICS_OPS)
    return "batch_norm" in name and uses_batch and values["input"].shape[0] > 1


@contextmanager
def _track_layers(model: nn.Module, recorder: _FaultRecorder) -> Iterator[None]:
    """Keep `recorder.layers` up to date, and record layers that use Python's or NumPy's global random generator."""
    states: list[Any] = []  # of these generators, at the start of each running layer

    def enter(layer: tuple[str, nn.Module]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            recorder.last_layer = layer
            recorder.layers.append(layer)
            states.append(_host_generator_state())

        return hook

    def leave(*_: Any) -> None:
        layer, state = recorder.layers.pop(), _host_generator_state()
        if states.pop() != state:
            recorder.add(layer, RANDOM_MESSAGE.format("of Python or NumPy"))
            states[:] = [state] * len(states)  # do not blame the layers around it

    with ExitStack() as stack:
        for layer in model.named_modules():
            stack.callback(layer[1].register_forward_pre_hook(enter(layer)).remove)
            stack.callback(layer[1].register_forward_hook(leave, always_call=True).remove)
        yield


def _host_generator_state() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), bytes(keys), position  # type: ignore[arg-type]


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Seed torch's generators with 0 inside the block; restore all global random generators at its end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _find_changed_buffers(model: nn.Module, before: dict[str, Tensor], recorder: _FaultRecorder) -> None:
    """Record layers whose buffers changed. A buffer whose shape changed is a table for the grid, which is fine."""
    for name, module in model.named_modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            old = before.get(f"{name}.{buffer_name}" if name else buffer_name)
            if isinstance(module, GroupBatchNorm3d) or old is None or old.shape != buffer.shape:
                continue
            if not torch.equal(old, buffer):
                recorder.add((name, module), BUFFER_MESSAGE.format(buffer_name))
