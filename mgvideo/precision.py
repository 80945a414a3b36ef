"""In which precision and memory format a model runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UserError


@dataclass(frozen=True)
class Precision:
    """Autocast to `dtype` (None: the parameters' own), convolutions in channels_last_3d or not, and why."""

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    why: str

    def autocast(self) -> AbstractContextManager:
        """The context that a forward runs in."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and into the memory format."""
        memory_format = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        return model.to(device=self.device).to(memory_format=memory_format)  # type: ignore[call-overload]

    def __str__(self) -> str:
        name = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        layout = "channels_last_3d" if self.channels_last else "contiguous"
        return f"{name}, {layout} ({self.why})"


def _auto(device: torch.device) -> tuple[torch.dtype | None, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name(device)} computes in bf16"
        return torch.float16, f"{torch.cuda.get_device_name(device)} has no bf16"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "this CPU has bf16 instructions"
    return None, "this CPU has no bf16 instructions"


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto`, `fp32`, `bf16` or `fp16` on a device.

    Raises:
        UserError: an unknown name, or fp16 on a CPU, whose gradients it underflows without being faster.
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        dtype, why = _auto(device)
    elif name not in dtypes:
        raise UserError(f"precision={name}: use auto, fp32, bf16 or fp16")
    elif name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use precision=auto, bf16 or fp32")
    else:
        dtype, why = dtypes[name], "as asked"
    return Precision(device, dtype, dtype is not None, why)


class Normalize:
    """uint8 clips `[n, t, s, s, 3]` to normalised `[n, 3, t, s, s]`, on the clips' device.

    The permuted view of channels-last pixels is already channels_last_3d: nothing is copied but by the conversion.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> None:
        self.mean = torch.tensor(mean, dtype=dtype).mul(255).view(1, 3, 1, 1, 1)
        self.std = torch.tensor(std, dtype=dtype).mul(255).view(1, 3, 1, 1, 1)

    def to(self, device: torch.device) -> Normalize:
        """Move the constants, in place."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, clips: Tensor) -> Tensor:
        """Mean and std are of pixels in 0–1."""
        return clips.permute(0, 4, 1, 2, 3).to(self.mean.dtype).sub_(self.mean).div_(self.std)
