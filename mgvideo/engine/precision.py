"""The precision and memory format that a model runs in, and a probe for faulty convolution kernels."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mgvideo.cpu.convolutions import convert_convolutions
from mgvideo.cpu.memory import keep_freed_memory
from mgvideo.errors import UserError
from mgvideo.plan.plan import Grid, Plan

MAX_GRADIENT_ERROR = 0.05  # relative error of a gradient's norm; rounding to bf16 causes 0.003
MAX_SLOWDOWN = 1.2  # relative to float32
# Steps of a shape from which cuDNN's timing of its kernels pays. On an H200 it takes 18 s for SlowFast 8×8 R50 at
# 8×112² (128 clips, bf16), whose step then takes 67 instead of 72 to 90 ms.
MIN_STEPS_TO_TUNE = 2000
X86 = ("x86_64", "AMD64")  # values of platform.machine()
# values of ONEDNN_MAX_CPU_ISA that keep oneDNN from using bf16 instructions, or only in gradients (AVX2_VNNI_2)
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Precision:
    """The device, autocast dtype and memory format of a model, and the reason for the choice."""

    device: torch.device
    dtype: torch.dtype | None  # None: no autocast, the dtype of the parameters
    channels_last: bool  # channels_last_3d, otherwise contiguous
    reason: str
    warning: str | None = None  # to print before a long run

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and memory format, in place, and return it.

        On a CPU, also convert its convolutions to faster kernels and make the process reuse freed memory.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
            convert_convolutions(model)
        memory_format = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        return model.to(device=self.device).to(memory_format=memory_format)  # type: ignore[call-overload]

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def __str__(self) -> str:
        layout = "channels_last_3d" if self.channels_last else "contiguous"
        return f"{self.name}, {layout} ({self.reason})"


def _auto_dtype(device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the autocast dtype of `precision=auto` on a device, and the reason."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name(device)} computes in bf16"
        return torch.float16, f"{torch.cuda.get_device_name(device)} has no bf16"
    if cpu_has_bf16():
        return torch.bfloat16, "this CPU has bf16 instructions"
    if platform.machine() in X86:
        return None, "this CPU has no bf16 instructions"
    return None, f"bf16 has not been measured on {platform.machine()}"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions for training (AMX or AVX-512 BF16) and oneDNN may use them.

    `torch.cpu._is_*` report what the CPU has; `ONEDNN_MAX_CPU_ISA` limits what oneDNN uses. False on aarch64, where
    training in bf16 has not been measured.
    """
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in ISAS_WITHOUT_BF16


def _emulation_warning() -> str:
    """Return a warning for precision=bf16 on a CPU without bf16 instructions for training."""
    if platform.machine() in X86:
        slower = "3.5 times as long as in fp32 with AVX2, 1.3 to 1.6 times with AVX-512"
        return (
            "precision=bf16: this CPU has no bf16 instructions and emulates them. A step of SlowFast-small took "
            f"{slower} (docs/benchmarks/speed.md). precision=auto takes fp32"
        )
    return f"precision=bf16 has not been measured on {platform.machine()}: precision=auto takes fp32"


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision for `auto`, `fp32`, `bf16` or `fp16` on a device, with a warning if bf16 is emulated.

    The memory format is channels_last_3d, but in float32 on GPUs, where it has not been measured, contiguous.

    Raises:
        UserError: the name is unknown, or fp16 is chosen on a CPU, where gradients underflow and nothing is faster.
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    warning = None
    if name == "auto":
        dtype, reason = _auto_dtype(device)
    elif name not in dtypes:
        raise UserError(f"precision={name}: use auto, fp32, bf16 or fp16")
    elif name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=auto, bf16 or fp32")
    else:
        dtype, reason = dtypes[name], "as requested"
        if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
            warning = _emulation_warning()
    return Precision(device, dtype, dtype is not None or device.type == "cpu", reason, warning)


@dataclass(frozen=True)
class ConvolutionFaults:
    """Faults that `probe_convolutions` finds: wrong gradients, which spoil training, and slow kernels, which do not."""

    wrong: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


def probe_convolutions(model: nn.Module, grids: Iterable[Grid], precision: Precision) -> ConvolutionFaults:
    """Find convolutions that this torch computes wrongly, or more slowly than in float32, in a reduced precision.

    Some releases have such faults: on CPUs, torch 2.15 reads uninitialised memory when it sums the weight gradients of
    a (1, 7, 7) stem of 8 or 16 channels; on GPUs, torch 2.9.0 is slow in bf16. Compares the gradients of the model's
    first layers with float32, on two clips of each grid. On a GPU, also compares the speed of a deeper layer.
    """
    if precision.dtype is None:
        return ConvolutionFaults()
    wrong = []
    with torch.random.fork_rng(devices=[]), without_cudnn_benchmark():
        torch.manual_seed(0)
        stems = [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.in_channels == 3]
        for conv in {(m.out_channels, m.kernel_size, m.stride, m.padding): m for m in stems}.values():
            for grid in {grid.name: grid for grid in grids}.values():
                if not _covers_kernel(grid, conv):
                    continue  # ViT pads clips that are smaller than its tubelets
                clips = torch.randn(2, grid.frames, grid.size, grid.size, 3, device=precision.device)
                clips = clips.permute(0, 4, 1, 2, 3)
                error = (_gradient_norm(conv, clips, precision) / _gradient_norm(conv, clips, None) - 1).abs()
                if not error < MAX_GRADIENT_ERROR:  # also if it is NaN
                    wrong.append(f"wrong weight gradients of {conv} at {grid.name}")
        slowdown = _slowdown(precision) if precision.device.type == "cuda" else 0.0
    slow = [f"convolutions take {slowdown:.1f} times as long as in float32"] if slowdown > MAX_SLOWDOWN else []
    return ConvolutionFaults(tuple(wrong), tuple(slow))


def is_worth_tuning(plan: Plan) -> bool:
    """Whether cuDNN should time its kernels at each shape of a plan (`torch.backends.cudnn.benchmark`)."""
    shapes = {(slot.grid.name, slot.batch) for phase in plan.phases for slot in phase.slots}
    return plan.steps >= MIN_STEPS_TO_TUNE * len(shapes)


def _covers_kernel(grid: Grid, conv: nn.Conv3d) -> bool:
    """Whether a clip of a grid, padded by the convolution, is at least as large as its kernel."""
    if isinstance(conv.padding, str):
        return True
    sides = zip(conv.kernel_size, (grid.frames, grid.size, grid.size), conv.padding, strict=True)
    return all(kernel <= side + 2 * padding for kernel, side, padding in sides)


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Turn off cuDNN's benchmark mode inside the block, so that it does not time kernels for shapes of a probe."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cudnn_warning(precision: Precision) -> str | None:
    """Return a warning if this is cuDNN 9.8 to 9.14, which compute some large 3-D convolutions in bf16 wrongly.

    `probe_convolutions` runs only first layers on two clips, and misses this. See pytorch/pytorch issue 163539.
    """
    version = torch.backends.cudnn.version() if precision.device.type == "cuda" else None
    if precision.dtype is not torch.bfloat16 or version is None or not 90800 <= version < 91500:
        return None
    name = f"{version // 10000}.{version // 100 % 100}"
    return (
        f"cuDNN {name} computes some large 3-D convolutions in bf16 wrongly, as 9.8 to 9.14 do: install cuDNN 9.15 or "
        "newer (pip install -U nvidia-cudnn-cu12, or -cu13), or choose precision=fp32"
    )


def _slowdown(precision: Precision) -> float:
    """Time forward and backward of a layer from the middle of a network, as a multiple of its time in float32."""
    conv = nn.Conv3d(64, 64, 3, padding=1, bias=False).to(precision.device)
    conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    clips = torch.randn(8, 16, 56, 56, 64, device=precision.device).permute(0, 4, 1, 2, 3)
    reduced, full = (min(_seconds(conv, clips, p) for _ in range(5)) for p in (precision, None))
    return reduced / full


def _gradient_norm(conv: nn.Conv3d, clips: Tensor, precision: Precision | None) -> Tensor:
    """Return the norm of the weight gradient of the output's sum of squares, scaled. `precision=None` is float32."""
    # Fill memory with NaN and free it: a kernel that reads uninitialised memory then returns NaN.
    torch.full((4 * clips.numel(),), float("nan"), device=clips.device)
    weight = conv.weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with precision.autocast() if precision else torch.autocast(clips.device.type, enabled=False):
        output = functional_call(conv, {"weight": weight}, clips)
    scale = output.numel() ** -0.5  # keeps the gradients of large outputs in the range of fp16, as a GradScaler would
    (gradient,) = torch.autograd.grad(output.float().square().sum() * scale, weight)
    return gradient.norm()


def _seconds(conv: nn.Conv3d, clips: Tensor, precision: Precision | None) -> float:
    start = time.perf_counter()
    float(_gradient_norm(conv, clips, precision))  # waits for the GPU
    return time.perf_counter() - start


class Normalize:
    """Normalises uint8 clips `[n, t, s, s, 3]` to float `[n, 3, t, s, s]`, on the clips' device.

    `mean` and `std` are of pixels in 0–1. The output is a permuted view in channels_last_3d, so that the conversion to
    `dtype` is the only copy.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> None:
        self.mean = torch.tensor(mean, dtype=dtype).mul(255)
        self.std = torch.tensor(std, dtype=dtype).mul(255)

    def to(self, device: torch.device) -> Normalize:
        """Move the constants, in place."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, clips: Tensor) -> Tensor:
        """Normalise clips that are on the device of the constants."""
        # Work on whole rows of pixels: on a CPU, broadcasting over three values at a time is five times as slow.
        mean, std = (values.repeat(clips.shape[3]) for values in (self.mean, self.std))
        rows = clips.flatten(3).to(self.mean.dtype).sub_(mean).div_(std)
        return rows.view(clips.shape).permute(0, 4, 1, 2, 3)
