"""What the probe for faulty convolutions finds, on a kernel that is made to be wrong and on good ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mgvideo.models.small import i3d_small
from mgvideo.plan import Grid
from mgvideo.precision import Precision, choose_precision, conv_faults

GRIDS = [Grid(2, 16, (1, 1), (16, 16)), Grid(4, 24, (1, 1), (24, 24))]
BF16 = Precision(torch.device("cpu"), torch.bfloat16, True, "a test")


class Broken(Precision):
    """Its convolutions are wrong for clips of 24 pixels."""

    @contextmanager
    def autocast(self) -> Iterator[None]:  # type: ignore[override]
        real = nn.functional.conv3d

        def conv3d(clips: Tensor, *rest: object) -> Tensor:
            return real(clips, *rest) * (float("nan") if clips.shape[-1] == 24 else 1.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "conv3d", conv3d)
            yield


def test_good_kernels_are_trusted_and_the_generator_is_left_alone() -> None:
    model = BF16.place(i3d_small(8, width=64))
    before = torch.random.get_rng_state()
    assert conv_faults(model, GRIDS, BF16) == []
    assert torch.equal(torch.random.get_rng_state(), before), "weights and dropout must not depend on the probe"
    assert conv_faults(i3d_small(8, width=8), GRIDS, choose_precision("fp32", torch.device("cpu"))) == []


def test_a_wrong_kernel_is_named_with_its_grid() -> None:
    model = i3d_small(8, width=8)
    (fault,) = conv_faults(model, GRIDS, Broken(torch.device("cpu"), torch.bfloat16, False, "a test"))
    assert fault.startswith("wrong weight gradients of Conv3d(3, 8")
    assert fault.endswith("at 4x24")
    assert model.trunk.stem.conv.weight.grad is None
