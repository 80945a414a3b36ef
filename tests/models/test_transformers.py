"""The transformers: positions on other grids than the published ones, depths of parameters, weights of VideoMAE."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import CASES
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig
from torchvision.models.video.mvit import MViT as TorchvisionMViT
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d
from zoo import build, build_narrow

from mgvideo.errors import UserError
from mgvideo.models.mvit import block_settings, relative_rows, resample
from mgvideo.models.naming import source_names
from mgvideo.models.pretrained import export_pyslowfast, load_pretrained
from mgvideo.models.swin import WindowAttention
from mgvideo.models.vit import sine_cosine_positions, vit

pytestmark = pytest.mark.numeric

TRANSFORMERS = ["mvit_v1_b", "mvit_v2_s", "swin3d_t", "vit_s", "mvit_small", "vit_small"]


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter, also biases and tables that start at zero, an influence on the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def logits(model: nn.Module, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return model(clip)


@pytest.mark.parametrize("version", [1, 2])
def test_mvit_has_the_logits_of_torchvisions_network_for_its_clip(version: int) -> None:
    settings = block_settings(8, 4, (1, 3), version)
    assert all(isinstance(setting, MSBlockConfig) for setting in settings)
    second = version == 2
    theirs = TorchvisionMViT((48, 48), 6, settings, second, False, second, second, num_classes=10)
    ours = build(
        "mvit_v2_s", width=8, depth=4, stages=[1, 3], version=version, table_frames=6, table_size=48, drop_path=0.0
    )
    load_pretrained(ours, randomise(theirs).state_dict())
    clip = torch.randn(2, 3, 6, 48, 48)
    torch.testing.assert_close(logits(ours.eval(), clip), logits(theirs, clip), atol=1e-5, rtol=1e-4)


def test_swin_has_the_logits_of_torchvisions_network_where_its_windows_are_whole() -> None:
    theirs = SwinTransformer3d([2, 4, 4], 8, [2, 2], [2, 4], [8, 7, 7], num_classes=10)
    ours = build("swin3d_t", width=8, depths=[2, 2], head_width=4)
    load_pretrained(ours, randomise(theirs).state_dict())
    for frames in (18, 6):  # 9 frames of tokens shift and pad their windows; a window of 3 frames is smaller
        clip = torch.randn(1, 3, frames, 72, 90)
        torch.testing.assert_close(logits(ours.eval(), clip), logits(theirs, clip), atol=1e-5, rtol=1e-4)


def test_positions_in_a_shrunken_swin_window_keep_their_offsets() -> None:
    layer = WindowAttention(8, [8, 7, 7], [0, 0, 0], 2)
    full = layer.get_relative_position_bias([8, 7, 7])[0].view(2, 8, 7, 7, 8, 7, 7)
    small = layer.get_relative_position_bias([3, 4, 2])[0].view(2, 3, 4, 2, 3, 4, 2)
    assert torch.equal(small, full[:, :3, :4, :2, :3, :4, :2])
    wrong = ShiftedWindowAttention3d.get_relative_position_bias(layer, [3, 4, 2])[0].view(small.shape)
    assert not torch.equal(small, wrong), "torchvision's own index is right now: remove WindowAttention"


@pytest.mark.parametrize(("rows", "length"), [(15, 7), (7, 15), (111, 55), (5, 1), (1, 4), (6, 6)])
def test_tables_are_interpolated_as_torch_does(rows: int, length: int) -> None:
    table = torch.randn(rows, 3, 2)
    expected = F.interpolate(table.flatten(1).T[None], length, mode="linear")[0].T.view(length, 3, 2)
    torch.testing.assert_close(resample(table, length), expected)


def test_relative_positions_depend_on_the_distance_alone() -> None:
    table = torch.arange(15.0)[:, None]  # of 8 positions: row 7 is distance 0
    assert torch.equal(relative_rows(table, 8, 8)[..., 0], 7 + torch.arange(8.0)[:, None] - torch.arange(8.0))
    pooled_keys = relative_rows(table, 8, 4)[..., 0]
    assert torch.equal(pooled_keys, 6 + torch.arange(8.0)[:, None] - 2 * torch.arange(4.0)), "as in PySlowFast"
    coarse = relative_rows(table, 4, 4)[..., 0]
    assert coarse[3, 0] == coarse.max()
    assert torch.allclose(coarse.diagonal(), torch.tensor(7.0)), "distance 0 keeps its row on every grid"


def test_mvit_tables_of_a_checkpoint_are_interpolated_to_the_networks() -> None:
    source = randomise(build_narrow("mvit_v2_s", table_frames=8, table_size=112))
    target = build_narrow("mvit_v2_s").eval()
    load_pretrained(target, source.state_dict())
    table = source.blocks[0].attn.rel_pos_h.detach()
    torch.testing.assert_close(target.blocks[0].attn.rel_pos_h.detach(), resample(table, 111))


def test_sines_and_cosines_of_long_clips_are_exact() -> None:
    positions = sine_cosine_positions(12_000, 6, torch.device("cpu"))
    expected = torch.arange(12_000, dtype=torch.float64)[:, None] / 10_000 ** (torch.tensor([0.0, 2, 4]).double() / 6)
    torch.testing.assert_close(positions[:, 0::2], expected.sin().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(positions[:, 1::2], expected.cos().float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_depths_rise_from_the_embedding_to_the_head(name: str) -> None:
    model = build_narrow(name)
    depths, names = model.parameter_depths(), dict(model.named_parameters())
    assert depths.keys() == names.keys()
    last = max(depths.values())
    blocks = 12 if name in ("swin3d_t", "vit_s") else 4 if "small" in name else 16
    assert last == blocks + 1
    assert set(depths.values()) == set(range(last + 1))
    assert depths[next(name for name in names if "head" in name)] == last
    assert depths[next(iter(names))] == 0
    in_order = [depths[name] for name in names if "blocks" in name or "features" in name]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_position_tables_and_tokens_are_listed_without_weight_decay(name: str) -> None:
    model = build_narrow(name)
    listed = {key for key, _ in model.named_parameters() if any(fnmatch(key, p) for p in model.no_weight_decay)}
    words = ("pos", "token")
    assert listed == {key for key, _ in model.named_parameters() if any(word in key.split(".")[-1] for word in words)}


def transformers_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a ViT's weights as transformers saves them today: queries, keys and values apart."""
    state = model.state_dict()
    renamed = {theirs: state[ours] for theirs, ours in source_names(model, "huggingface").items()}
    apart = {}
    for name, tensor in renamed.items():
        layer = name.removesuffix("qkv.weight")
        if layer == name:
            apart[re.sub(r"\.([qv])_bias$", lambda m: {"q": ".query", "v": ".value"}[m[1]] + ".bias", name)] = tensor
        else:
            apart |= {
                f"{layer}{part}.weight": t for part, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            }
    return apart


def test_videomae_in_its_authors_names_and_in_older_and_newer_transformers(tmp_path: Path) -> None:
    source = randomise(build_narrow("vit_small"))
    newer = transformers_state(source)
    published = {name for name, *_ in CASES["videomae_s_16x64"]["tensors"]}
    assert {name for name in newer if ".layer.0." in name} == {name for name in published if ".layer.0." in name}
    older = {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): t for name, t in newer.items()}
    authors = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    assert {"model.blocks.0.attn.qkv.weight", "model.blocks.0.attn.q_bias", "model.head.bias"} <= authors.keys()
    save_file({name: tensor.contiguous() for name, tensor in older.items()}, tmp_path / "older.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in newer.items()}, tmp_path / "newer.safetensors")
    torch.save({"module": authors}, tmp_path / "authors.pth")
    for file in ("older.safetensors", "newer.safetensors", "authors.pth"):
        model = build_narrow("vit_small")
        load_pretrained(model, tmp_path / file)
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items()), file


@pytest.mark.parametrize("source", ["mgvideo", "huggingface"])
def test_pretrained_videomae_keeps_a_new_norm_and_head(source: str, caplog: pytest.LogCaptureFixture) -> None:
    model, other = build_narrow("vit_small"), randomise(build_narrow("vit_small"))
    state = other.state_dict()
    names = {
        theirs: ours for theirs, ours in source_names(other, source).items() if not ours.startswith(("fc_", "head"))
    }
    content = {theirs: state[ours] for theirs, ours in names.items()}
    if source == "mgvideo":  # encoder and decoder of the authors' pre-training
        content = {f"encoder.{key}": tensor for key, tensor in content.items()}
        content |= {"encoder.norm.weight": torch.ones(96), "mask_token": torch.zeros(1, 1, 48)}
        content |= {f"decoder.blocks.0.{key}": torch.zeros(48) for key in ("norm1.weight", "norm1.bias")}
        content |= {"decoder.head.weight": torch.zeros(1536, 48), "decoder.head.bias": torch.zeros(1536)}
    else:
        content |= {"videomae.layernorm.weight": torch.ones(96), "decoder.norm.weight": torch.ones(48)}
    head, norm = model.head.weight.clone(), model.fc_norm.weight.clone()
    load_pretrained(model, {"model": content})
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.fc_norm.weight, norm)
    assert all(torch.equal(model.state_dict()[ours], state[ours]) for ours in names.values())
    assert "keeps its own" in caplog.text


def test_a_fine_tuned_vit_without_its_norm_is_refused() -> None:
    state = build_narrow("vit_small").state_dict()
    del state["fc_norm.weight"]
    with pytest.raises(UserError, match=r"fc_norm\.weight is missing"):
        load_pretrained(build_narrow("vit_small"), state)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("mvit_v2_s", {"version": 3}, "choose 1 or 2"),
        ("mvit_v2_s", {"stages": [1, 16]}, "indices from 1 to 15"),
        ("mvit_v2_s", {"table_size": 8}, "choose larger clips"),
        ("swin3d_t", {"width": 100}, "multiple of head_width 32"),
        ("vit_s", {"width": 100}, "multiple of 12"),
    ],
)
def test_wrong_values_give_one_line(name: str, keys: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        build(name, **keys)
    assert isinstance(error.value.__cause__, UserError)


@pytest.mark.parametrize("name", ["swin3d_t", "vit_s"])
def test_export_to_pyslowfast_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="PySlowFast has no"):
        export_pyslowfast(build_narrow(name))


def test_layers_of_the_small_vit_start_with_the_outputs_of_a_wide_one() -> None:
    torch.manual_seed(0)
    spreads = []
    for model, width in ((build("vit_small", width=96), 96), (vit(8, width=768, depth=1), 768)):
        spreads.append(model.blocks[0].mlp.fc1(torch.randn(64, width)).std().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
