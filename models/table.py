"""Print the table of models/README.md, our sizes beside the published ones: `python -m mgvideo.models.table`."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ZooRow:
    """A network with one input size, and the published figures for it."""

    config: str
    frames: int
    size: int
    parameters: int | None = None  # published, with 400 classes
    millions: str | None = None  # published number of parameters in millions, if the exact number is not published
    gflops: float | None = None  # published, of one clip; a multiply-add counts once
    classes: int = 400
    bn_operations: int = 2  # per batch-normalised value, in the published GFLOPs

    def build(self) -> nn.Module:
        """Build the network of the config on the meta device, without memory for its weights."""
        text = (files("mgvideo.configs") / "model" / f"{self.config}.yaml").read_text(encoding="utf-8")
        file: dict[str, Any] = yaml.safe_load(text)
        keys = file.get("model", file)  # a file may have the package _global_
        factory = pkgutil.resolve_name(keys.pop("_target_"))
        with torch.device("meta"):
            return factory(**{**keys, "num_classes": self.classes})


# Published figures: the PyTorchVideo model zoo; the metadata of torchvision's weights for r2plus1d_18, mvit_v1_b,
# mvit_v2_s and the parameters of swin3d; arXiv 2106.13230 for the GFLOPs of swin3d; PySlowFast's projects/mvitv2 for
# mvit_v2_b; the model zoo of VideoMAE for vit. Those of X3D count a batch-normalised value as five operations.
ROWS = (
    ZooRow("c2d_r50", 8, 256, 24_327_632, gflops=25.89),
    ZooRow("slow_r50", 4, 256, 32_454_096, gflops=27.55),
    ZooRow("slow_r50", 8, 256, 32_454_096, gflops=54.52),
    ZooRow("i3d_r50", 8, 256, 28_043_472, gflops=37.53),
    ZooRow("i3d_r101", 8, 256),
    ZooRow("i3d_nln_r50", 8, 256),
    ZooRow("i3d_nln_r101", 8, 256),
    ZooRow("slowfast_4x16_r50", 32, 256, millions="34.48", gflops=36.69),
    ZooRow("slowfast_8x8_r50", 32, 256, 34_566_488, gflops=65.71),
    ZooRow("slowfast_8x8_r101", 32, 256, 62_826_968, gflops=127.20),
    ZooRow("slowfast_16x8_r50", 64, 256),
    ZooRow("slowfast_16x8_r101", 64, 256, millions="53.77", gflops=215.61),
    ZooRow("slowfast_nln_4x16_r50", 32, 256),
    ZooRow("slowfast_nln_8x8_r50", 32, 256),
    ZooRow("slowfast_nln_16x8_r101", 64, 256),
    ZooRow("r2plus1d_18", 16, 112, 31_505_325, gflops=40.519),
    ZooRow("r2plus1d_34", 16, 112),
    ZooRow("r2plus1d_r50", 16, 256, 28_107_600, gflops=76.45),
    ZooRow("x3d_xs", 4, 182, millions="3.79", gflops=0.91, bn_operations=5),
    ZooRow("x3d_s", 13, 182, millions="3.79", gflops=2.96, bn_operations=5),
    ZooRow("x3d_m", 16, 256, millions="3.79", gflops=6.72, bn_operations=5),
    ZooRow("x3d_l", 16, 356, millions="6.15", gflops=26.64, bn_operations=5),
    ZooRow("mvit_v1_b", 16, 224, 36_610_672, gflops=70.60),
    ZooRow("mvit_v2_s", 16, 224, 34_537_744, gflops=64.22),
    ZooRow("mvit_v2_b", 32, 224, millions="51.2", gflops=225),
    ZooRow("swin3d_t", 32, 224, 28_158_070, gflops=88),
    ZooRow("swin3d_s", 32, 224, 49_816_678, gflops=166),
    ZooRow("swin3d_b", 32, 224, 88_048_984, gflops=282),
    ZooRow("vit_s", 16, 224, millions="22", gflops=57),
    ZooRow("vit_b", 16, 224, millions="87", gflops=180),
    ZooRow("vit_l", 16, 224, gflops=597),
    ZooRow("slowfast_small", 16, 64, classes=8),
    ZooRow("i3d_small", 16, 64, classes=8),
    ZooRow("i3d_nln_small", 16, 64, classes=8),
    ZooRow("r2plus1d_small", 16, 64, classes=8),
    ZooRow("x3d_small", 16, 64, classes=8),
    ZooRow("mvit_small", 16, 64, classes=8),
    ZooRow("vit_small", 16, 64, classes=8),
)


def count_parameters(model: nn.Module) -> int:
    """Count the learnable values of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(model: nn.Module, frames: int, size: int, bn_operations: int = 2) -> float:
    """Count the GFLOPs of one clip in evaluation as fvcore does.

    A multiply-add counts once, a batch-normalised value counts as `bn_operations`. The network may be on torch's meta
    device, which fvcore does not support: there, nothing is computed.
    """
    normalised_values = 0

    def count_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal normalised_values
        normalised_values += output.numel()

    hooks = [m.register_forward_hook(count_output) for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    clip = torch.empty(1, 3, frames, size, size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(clip)
    for hook in hooks:
        hook.remove()
    return (counter.get_total_flops() / 2 + bn_operations * normalised_values) / 1e9


def format_table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| `model=` | input | parameters | published | GFLOPs | published |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        model = row.build()
        published = f"{row.parameters:,}" if row.parameters else f"{row.millions} M" if row.millions else "–"
        cells = (
            row.config,
            f"{row.frames} × {row.size}²",
            f"{count_parameters(model):,}",
            published,
            f"{count_gflops(model, row.frames, row.size, row.bn_operations):.2f}",
            f"{row.gflops:.2f}" if row.gflops else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table())
