"""X3D's weights in PyTorchVideo's names, and its first shortcut, which has no batch norm there."""

from __future__ import annotations

import pytest
import torch
from golden import CASES, build_case, draw_weights
from torch import Tensor, nn
from zoo import build

from mgvideo.models.pretrained import load_pretrained

pytestmark = pytest.mark.numeric


def pytorchvideo_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename PySlowFast's weights as PyTorchVideo does, written down apart from the rules that the loader uses."""
    renamed = {}
    for name, tensor in state.items():
        stage, _, rest = name.partition(".")
        block, _, part = rest.partition(".")
        if stage == "s1":
            part = {"conv_xy.weight": "conv.conv_t.weight", "conv.weight": "conv.conv_xy.weight"}.get(
                part, part.replace("bn.", "norm.")
            )
            renamed[f"blocks.0.{part}"] = tensor
        elif stage == "head":
            head = {"conv_5": "pool.pre_conv", "conv_5_bn": "pool.pre_norm", "lin_5": "pool.post_conv"}
            renamed[f"blocks.5.{head.get(block, 'proj')}.{part}"] = tensor
        elif not name.startswith("s2.pathway0_res0.branch1_bn."):
            number = block.rpartition("_res")[2]
            for ours, theirs in (
                ("branch1.", "branch1_conv."),
                ("branch1_bn.", "branch1_norm."),
                ("branch2.se.fc1.", "branch2.norm_b.1.block.0."),
                ("branch2.se.fc2.", "branch2.norm_b.1.block.2."),
                ("branch2.b_bn.", "branch2.norm_b.0."),
                *((f"branch2.{x}.", f"branch2.conv_{x}.") for x in "abc"),
                *((f"branch2.{x}_bn.", f"branch2.norm_{x}.") for x in "ac"),
            ):
                if part.startswith(ours):
                    part = part.replace(ours, theirs)
                    break
            renamed[f"blocks.{int(stage[1]) - 1}.res_blocks.{number}.{part}"] = tensor
    return renamed


def test_pytorchvideos_weights_give_the_same_logits_with_and_without_the_norm_that_it_lacks() -> None:
    torch.manual_seed(0)
    theirs = pytorchvideo_state(draw_weights(CASES["x3d_m_64"]))
    assert "blocks.1.res_blocks.0.branch1_norm.weight" not in theirs
    clip = torch.randn(1, 3, 5, 45, 45)
    plain, filled = build("x3d_m", shortcut_norm=False), build_case("x3d_m_64")
    summary = load_pretrained(plain, theirs)
    assert f"{len(theirs)} tensors" in summary
    assert "names of pytorchvideo" in summary
    assert "starts as the identity (model.shortcut_norm=false leaves it out)" in load_pretrained(filled, theirs)
    assert isinstance(plain.trunk.res2.block0.shortcut_bn, nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(clip), filled.eval()(clip), atol=1e-5, rtol=1e-5)
