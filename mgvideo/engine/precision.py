"""In which precision and memory format a model runs."""

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
from mgvideo.plan.plan import Grid

MAX_GRADIENT_ERROR = 0.05  # relative, of a gradient's norm; bf16 itself gives 0.003
MAX_SLOWDOWN = 1.2  # against float32
X86 = ("x86_64", "AMD64")  # what platform.machine() calls it
# values of ONEDNN_MAX_CPU_ISA under which oneDNN has no bf16 instructions, or none for gradients (AVX2_VNNI_2)
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Precision:
    """Autocast to `dtype` (None: the parameters' own), convolutions in channels_last_3d or not, and why."""

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    why: str
    warning: str | None = None  # what to print before a long run

    def autocast(self) -> AbstractContextManager:
        """The context that a forward runs in."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and into the memory format, its convolutions to kernels that suit a CPU."""
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
        return f"{self.name}, {layout} ({self.why})"


def _auto(device: torch.device) -> tuple[torch.dtype | None, str]:
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
    """Whether this CPU trains in bf16 instructions: AMX or AVX-512 BF16, where oneDNN may use them.

    `ONEDNN_MAX_CPU_ISA` limits what oneDNN uses; `torch.cpu._is_*` report the bare CPU. False on aarch64, where
    training in bf16 has not been measured.
    """
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in WITHOUT_BF16


def _emulation_warning() -> str:
    """What to say where bf16 is chosen on a CPU that does not train in bf16 instructions."""
    if platform.machine() in X86:
        slower = "3.5 times as long as in fp32 with AVX2, 1.3 to 1.6 times with AVX-512"
        return (
            "precision=bf16: this CPU has no bf16 instructions and emulates them. A step of SlowFast-small took "
            f"{slower} (docs/benchmarks/speed.md). precision=auto takes fp32"
        )
    return f"precision=bf16 has not been measured on {platform.machine()}: precision=auto takes fp32"


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto`, `fp32`, `bf16` or `fp16` on a device. Its `warning` says where bf16 is emulated.

    Raises:
        UserError: an unknown name, or fp16 on a CPU, whose gradients it underflows without being faster.
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    warning = None
    if name == "auto":
        dtype, why = _auto(device)
    elif name not in dtypes:
        raise UserError(f"precision={name}: use auto, fp32, bf16 or fp16")
    elif name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=auto, bf16 or fp32")
    else:
        dtype, why = dtypes[name], "as asked"
        if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
            warning = _emulation_warning()
    return Precision(device, dtype, dtype is not None, why, warning)


@dataclass(frozen=True)
class ConvolutionFaults:
    """What `probe_convolutions` finds: wrong gradients, which spoil training, and slow kernels, which do not."""

    wrong: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


def probe_convolutions(model: nn.Module, grids: Iterable[Grid], precision: Precision) -> ConvolutionFaults:
    """Find convolutions that this torch computes wrongly, or more slowly than in float32, in a precision on its device.

    Some releases do: on CPUs, torch 2.15 reads uninitialised memory where it sums the weight gradients of a (1, 7, 7)
    stem of 8 or 16 channels; on GPUs, torch 2.9.0 is slow in bf16. Compares the model's first layers on two clips of
    each grid with float32 and, on a GPU, the speed of a deeper layer.
    """
    if precision.dtype is None:
        return ConvolutionFaults()
    wrong = []
    with torch.random.fork_rng(devices=[]), without_tuning():
        torch.manual_seed(0)
        stems = [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.in_channels == 3]
        for conv in {(m.out_channels, m.kernel_size, m.stride, m.padding): m for m in stems}.values():
            for grid in {grid.name: grid for grid in grids}.values():
                clips = torch.randn(2, grid.frames, grid.size, grid.size, 3, device=precision.device)
                clips = clips.permute(0, 4, 1, 2, 3)
                error = (_gradient(conv, clips, precision) / _gradient(conv, clips, None) - 1).abs()
                if not error < MAX_GRADIENT_ERROR:
                    wrong.append(f"wrong weight gradients of {conv} at {grid.name}")
        slowdown = _slowdown(precision) if precision.device.type == "cuda" else 0.0
    slow = [f"convolutions take {slowdown:.1f} times as long as in float32"] if slowdown > MAX_SLOWDOWN else []
    return ConvolutionFaults(tuple(wrong), tuple(slow))


@contextmanager
def without_tuning() -> Iterator[None]:
    """Inside, cuDNN does not time its kernels at each new shape, for shapes that training does not use."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cudnn_warning(precision: Precision) -> str | None:
    """What to know about this version of cuDNN: 9.8 to 9.14 compute some large 3-D convolutions in bf16 wrongly.

    The probe tries first layers only, at two clips, and does not find that. See pytorch/pytorch issue 163539.
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
    """Time of a layer in the middle of a network, forward and backward, as a multiple of its time in float32."""
    conv = nn.Conv3d(64, 64, 3, padding=1, bias=False).to(precision.device)
    conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    clips = torch.randn(8, 16, 56, 56, 64, device=precision.device).permute(0, 4, 1, 2, 3)
    reduced, full = (min(_seconds(conv, clips, p) for _ in range(5)) for p in (precision, None))
    return reduced / full


def _gradient(conv: nn.Conv3d, clips: Tensor, precision: Precision | None) -> Tensor:
    """Norm of the weight gradient of the output's mean square."""
    # Fill memory with NaN and free it: a kernel that reads uninitialised memory then returns NaN.
    torch.full((4 * clips.numel(),), float("nan"), device=clips.device)
    weight = conv.weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with precision.autocast() if precision else torch.autocast(clips.device.type, enabled=False):
        output = functional_call(conv, {"weight": weight}, clips)
    (gradient,) = torch.autograd.grad(output.float().square().mean(), weight)
    return gradient.norm()


def _seconds(conv: nn.Conv3d, clips: Tensor, precision: Precision | None) -> float:
    start = time.perf_counter()
    float(_gradient(conv, clips, precision))
    return time.perf_counter() - start


class Normalize:
    """uint8 clips `[n, t, s, s, 3]` to normalised `[n, 3, t, s, s]`, on the clips' device.

    The permuted view of channels-last pixels is already channels_last_3d: nothing is copied but by the conversion.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> None:
        self.mean = torch.tensor(mean, dtype=dtype).mul(255)
        self.std = torch.tensor(std, dtype=dtype).mul(255)

    def to(self, device: torch.device) -> Normalize:
        """Move the constants, in place."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, clips: Tensor) -> Tensor:
        """Mean and std are of pixels in 0–1."""
        # by rows of pixels: a CPU goes through runs of three values five times as slowly
        mean, std = (colour.repeat(clips.shape[3]) for colour in (self.mean, self.std))
        rows = clips.flatten(3).to(self.mean.dtype).sub_(mean).div_(std)
        return rows.view(clips.shape).permute(0, 4, 1, 2, 3)
