"""The networks match the published ones in logits, parameters and cost, and torchvision's where it has them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from golden import CASES, CONFIGS, build_case, draw_clip, draw_weights
from torch import nn
from zoo import NAMES, build

import mgvideo.models
from mgvideo.models.nonlocal_block import NonLocal
from mgvideo.models.pretrained import load_pretrained
from mgvideo.models.table import ROWS, ZooRow, count_gflops, count_parameters, format_table

pytestmark = pytest.mark.numeric


def test_every_case_is_tested() -> None:
    assert CASES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CASES)
def test_published_weights_give_published_logits(name: str) -> None:
    model = build_case(name).eval()
    load_pretrained(model, draw_weights(CASES[name]), CASES[name]["source"])
    with torch.no_grad():
        logits = model(draw_clip(CASES[name]))
    difference = (logits - torch.tensor(CASES[name]["logits"])).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.slow  # full width, because torchvision builds no other, on published clips: a few seconds each
@pytest.mark.parametrize("name", ["mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"])
def test_torchvision_networks_have_torchvision_logits(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = getattr(torchvision.models.video, name)(num_classes=10).eval(), build(name).eval()
    for parameter in theirs.parameters():  # biases and position tables start at or near zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    load_pretrained(ours, theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    clip = torch.randn(1, 3, 32 if name.startswith("swin") else 16, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(clip), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.config}-{row.frames}x{row.size}")
def test_sizes_match_published_ones(row: ZooRow) -> None:
    model = row.build()
    parameters = count_parameters(model)
    if row.parameters:
        assert parameters == row.parameters
    if row.millions:
        assert round(parameters / 1e6, len(row.millions.partition(".")[2])) == float(row.millions)
    if row.gflops:
        gflops = count_gflops(model, row.frames, row.size, row.bn_operations)
        assert gflops == pytest.approx(row.gflops, rel=0.015)


def test_every_network_is_in_the_table() -> None:
    assert {row.config for row in ROWS} == set(NAMES)


@pytest.mark.parametrize("name", ["slowfast_8x8_r50", "c2d_r50", "r2plus1d_18", "r2plus1d_r50"])
def test_gflops_match_fvcore(name: str) -> None:
    model = build(name, width=8).eval()
    expected = FlopCountAnalysis(model, torch.zeros(1, 3, 8, 64, 64)).unsupported_ops_warnings(False).total() / 1e9
    assert count_gflops(model, 8, 64) == pytest.approx(expected, rel=1e-3)


def test_readme_contains_the_printed_table() -> None:
    assert format_table() in (Path(mgvideo.models.__path__[0]) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["slowfast_nln_8x8_r50", "i3d_nln_r50", "r2plus1d_r50"])
def test_initialisation_matches_published_one(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=400, width=16)
    last_norms = [
        norm
        for key, norm in model.named_modules()
        if key.endswith("bn_c") or (".nonlocal" in key and key.endswith("bn"))
    ]
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm3d)):
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        assert torch.equal(
            norm.weight,
            torch.full_like(norm.weight, 0.0 if any(norm is last_norm for last_norm in last_norms) else 1.0),
        )
        assert not norm.bias.any()
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.head.dropout.p == 0.5


@pytest.mark.parametrize(
    ("name", "width", "std"),
    [("mvit_v2_s", 96, 0.02), ("mvit_small", 32, 0.0346), ("mvit_small", 16, 0.049), ("vit_small", 96, 0.0566)],
)
def test_initial_weights_of_transformers_grow_as_their_width_shrinks(name: str, width: int, std: float) -> None:
    torch.manual_seed(0)
    large = [
        m.weight for m in build(name, width=width).modules() if isinstance(m, nn.Linear) and m.weight.numel() > 4000
    ]
    assert large
    for weight in large:
        assert weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("mode", ["softmax", "dot_product"])
def test_non_local_block_is_attention_over_all_positions(mode: str) -> None:
    torch.manual_seed(0)
    block = NonLocal(8, mode).eval()
    clip = torch.randn(2, 8, 3, 6, 5)
    pooled = nn.functional.max_pool3d(clip, (1, 2, 2))
    query, key, value = (f(x).flatten(2) for f, x in ((block.theta, clip), (block.phi, pooled), (block.g, pooled)))
    affinity = torch.einsum("ncp,ncq->npq", query, key)
    affinity = (affinity / 2).softmax(2) if mode == "softmax" else affinity / affinity.shape[2]
    gathered = torch.einsum("npq,ncq->ncp", affinity, value).view(2, 4, 3, 6, 5)
    torch.testing.assert_close(block(clip), clip + block.bn(block.out(gathered)))
