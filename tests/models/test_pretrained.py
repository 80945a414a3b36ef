"""Pretrained weights with the names of every source, from files that the tests write."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from golden import CASES, CONFIGS, build_case, draw_clip, draw_weights
from tolerance import rounding_error
from torch import Tensor, nn
from zoo import build

from mgvideo.errors import UserError
from mgvideo.models.naming import source_names
from mgvideo.models.pretrained import export_pyslowfast, load_pretrained
from mgvideo.models.small import slowfast_small

pytestmark = pytest.mark.numeric

CAFFE2_NAMES = {  # name in the model zoo's files → name in PySlowFast
    "conv1_w": "s1.pathway0_stem.conv.weight",
    "res_conv1_bn_s": "s1.pathway0_stem.bn.weight",
    "res_conv1_bn_riv": "s1.pathway0_stem.bn.running_var",
    "t_conv1_w": "s1.pathway1_stem.conv.weight",
    "t_res_conv1_bn_rm": "s1.pathway1_stem.bn.running_mean",
    "t_pool1_subsample_w": "s1_fuse.conv_f2s.weight",
    "t_pool1_subsample_bn_b": "s1_fuse.bn.bias",
    "t_res2_2_branch2c_bn_subsample_w": "s2_fuse.conv_f2s.weight",
    "t_res4_5_branch2c_bn_subsample_bn_s": "s4_fuse.bn.weight",
    "res2_0_branch1_w": "s2.pathway0_res0.branch1.weight",
    "res2_0_branch1_bn_b": "s2.pathway0_res0.branch1_bn.bias",
    "res4_3_branch2a_w": "s4.pathway0_res3.branch2.a.weight",
    "t_res5_1_branch2c_bn_rm": "s5.pathway1_res1.branch2.c_bn.running_mean",
    "nonlocal_conv3_1_theta_w": "s3.pathway0_nonlocal1.conv_theta.weight",
    "nonlocal_conv4_5_out_b": "s4.pathway0_nonlocal5.conv_out.bias",
    "nonlocal_conv4_5_bn_s": "s4.pathway0_nonlocal5.bn.weight",
    "pred_w": "head.projection.weight",
    "pred_b": "head.projection.bias",
}


def caffe2_blobs(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Convert a PySlowFast state dict to the content of a Caffe2 file: other names, and the solver's state."""
    blobs = {"lr": np.float32([0.1]), "model_iter": np.int64([1000])}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        new = re.sub(r"^s1\.pathway0_stem\.(conv|bn)", lambda m: {"conv": "conv1", "bn": "res_conv1_bn"}[m[1]], name)
        new = re.sub(r"^s1\.pathway1_stem\.(conv|bn)", lambda m: {"conv": "t_conv1", "bn": "t_res_conv1_bn"}[m[1]], new)
        new = re.sub(r"^s(\d)\.pathway0_res(\d+)\.branch", r"res\1_\2_branch", new)
        new = re.sub(r"^s(\d)\.pathway1_res(\d+)\.branch", r"t_res\1_\2_branch", new)
        new = re.sub(r"branch2\.", "branch2", new)
        new = re.sub(r"^s(\d)\.pathway0_nonlocal(\d)\.(?:conv_)?(\w+)", r"nonlocal_conv\1_\2_\3", new)
        for stage, before in enumerate(("pool1", "res2_2_branch2c_bn", "res3_3_branch2c_bn", "res4_5_branch2c_bn"), 1):
            new = new.replace(f"s{stage}_fuse.conv_f2s", f"t_{before}_subsample")
            new = new.replace(f"s{stage}_fuse.bn", f"t_{before}_subsample_bn")
        new = new.replace("head.projection", "pred")
        suffix = {"running_mean": "_rm", "running_var": "_riv", "bias": "_b"}
        suffix["weight"] = "_s" if "bn" in new.rsplit(".", 1)[0].rsplit("_", 1)[-1] else "_w"
        stem, _, kind = new.rpartition(".")
        blobs[stem + suffix[kind]] = tensor.numpy()
        blobs[stem + suffix[kind] + "_momentum"] = np.zeros_like(tensor.numpy())
    return blobs


def logits(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(draw_clip(CASES[name]))


def assert_logits(name: str, model: nn.Module) -> None:
    torch.testing.assert_close(logits(name, model), torch.tensor(CASES[name]["logits"]), atol=1e-3, rtol=0)


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 did, whose strings were bytes."""

    def save_string(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string}  # noqa: RUF012


@pytest.mark.parametrize("name", ["slowfast_8x8_r50_w8", "i3d_nln_8x8_r50_w8"])
@pytest.mark.parametrize("python", [2, 3])
def test_caffe2_file(tmp_path: Path, name: str, python: int) -> None:
    state = draw_weights(CASES[name])
    blobs = caffe2_blobs(state)
    for caffe2, pyslowfast in CAFFE2_NAMES.items():
        assert caffe2 not in blobs or np.array_equal(blobs[caffe2], state[pyslowfast])
    with open(tmp_path / "model.pkl", "wb") as file:
        pickler = Python2Pickler(file, 2) if python == 2 else pickle.Pickler(file, 4)
        pickler.dump({"blobs": blobs, "cfg": "text"})
    model = build(CONFIGS[name], width=8)
    load_pretrained(model, tmp_path / "model.pkl")
    assert_logits(name, model)


def test_caffe2_names_cover_both_networks() -> None:
    all_names = {
        name
        for case in ("slowfast_8x8_r50_w8", "i3d_nln_8x8_r50_w8")
        for name in caffe2_blobs(draw_weights(CASES[case]))
    }
    assert CAFFE2_NAMES.keys() <= all_names


@pytest.mark.parametrize("zipped", [True, False])
def test_pyslowfast_file(tmp_path: Path, zipped: bool) -> None:
    name = "slow_8x8_r50_w8"
    state = {f"module.{key}": tensor for key, tensor in draw_weights(CASES[name]).items()}
    content = {"model_state": state, "epoch": 3, "cfg": "A: 1"}
    torch.save(content, tmp_path / "model.pyth", _use_new_zipfile_serialization=zipped)
    model = build(CONFIGS[name], width=8)
    load_pretrained(model, str(tmp_path / "model.pyth"))
    assert_logits(name, model)


def test_pytorchvideo_file(tmp_path: Path) -> None:
    name = "ptv_slowfast_8x8_r50_w8"
    torch.save({"model_state": draw_weights(CASES[name])}, tmp_path / "model.pyth")
    model = build(CONFIGS[name], width=8)
    load_pretrained(model, tmp_path / "model.pyth")
    assert_logits(name, model)


def test_pytorchvideo_numbers_the_pooling_of_c2d_as_a_part() -> None:
    model = build("c2d_r50", width=8)
    theirs = {}
    for name, tensor in export_pyslowfast(model)["model_state"].items():
        stage = re.match(r"s(\d)\.pathway0_res(\d)\.", name)
        if stage:
            part = int(stage[1]) - (1 if stage[1] == "2" else 0)
            name = name.replace(stage[0], f"blocks.{part}.res_blocks.{stage[2]}.")
            name = re.sub(r"branch2\.([abc])_bn", r"branch2.norm_\1", name)
            name = re.sub(r"branch2\.([abc])\.", r"branch2.conv_\1.", name)
            name = name.replace("branch1_bn", "branch1_norm").replace("branch1.", "branch1_conv.")
        name = name.replace("s1.pathway0_stem.conv", "blocks.0.conv").replace("s1.pathway0_stem.bn", "blocks.0.norm")
        theirs[name.replace("head.projection", "blocks.6.proj")] = tensor
    load_pretrained(model, theirs, "pytorchvideo")


def test_r2plus1d_18_matches_torchvision() -> None:
    theirs = torchvision.models.video.r2plus1d_18(num_classes=10).eval()
    model = build("r2plus1d_18").eval()
    load_pretrained(model, theirs.state_dict())
    assert model.state_dict().keys() == theirs.state_dict().keys()
    images = torch.randn(1, 3, 6, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images))


def test_mgvideo_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = build("r2plus1d_small"), build("r2plus1d_small")
    torch.save({"model": source.state_dict(), "step": 7}, tmp_path / "step_00000007.pt")
    load_pretrained(target, tmp_path / "step_00000007.pt")
    for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def image_network() -> torchvision.models.ResNet:
    """Build a ResNet-50 whose batch norms have random statistics."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def test_inflated_c2d_has_the_logits_of_the_image_network_on_still_clips(caplog: pytest.LogCaptureFixture) -> None:
    images, network, model = torch.randn(2, 3, 64, 64), image_network(), build("c2d_r50").eval()
    load_pretrained(model, network.state_dict())
    assert [record.message for record in caplog.records] == [
        "the head in the given state dict is for another number of classes: the network keeps its own"
    ]
    model.head.fc = network.fc
    with torch.no_grad():
        logits, expected = model(images[:, :, None].expand(-1, -1, 4, -1, -1)), network(images)
    # two networks of 50 layers; the longest sums are over 3 × 3 positions of 512 channels
    error = rounding_error(torch.float32, terms=9 * 512, layers=2 * 50)
    assert (logits - expected).norm() < error * expected.norm()


def test_inflated_kernels_are_spread_evenly_over_time() -> None:
    network, model = image_network(), build("i3d_nln_r50")
    load_pretrained(model, network.state_dict(), "torchvision")
    pairs = [
        (model.trunk.stem.conv, network.conv1),
        (model.trunk.res2.block0.conv_a, network.layer1[0].conv1),
        (model.trunk.res4.block2.conv_a, network.layer3[2].conv1),
        (model.trunk.res5.block0.shortcut, network.layer4[0].downsample[0]),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.weight.sum(2), theirs.weight)
        for frame in ours.weight.unbind(2):
            assert torch.equal(frame, ours.weight[:, :, 0])
    assert not model.trunk.res3.nonlocal1.bn.weight.any()


def test_head_for_another_number_of_classes_is_not_loaded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["slow_8x8_r50_w8"]
    model = build("slow_r50", num_classes=7, width=8)
    before = model.head.fc.weight.clone()
    load_pretrained(model, draw_weights(case))
    assert len([record for record in caplog.records if "number of classes" in record.message]) == 1
    assert torch.equal(model.head.fc.weight, before)
    assert torch.equal(model.trunk.stem.conv.weight, draw_weights(case)["s1.pathway0_stem.conv.weight"])


def test_tensors_that_do_not_fit_are_listed() -> None:
    state = draw_weights(CASES["slow_8x8_r50_w8"])
    del state["s3.pathway0_res1.branch2.b.weight"]
    state["s9.extra"] = torch.zeros(2)
    state["s1.pathway0_stem.bn.bias"] = torch.zeros(5)
    model = build("slow_r50", width=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(model, state)
    text = str(error.value)
    assert "s3.pathway0_res1.branch2.b.weight is missing" in text
    assert "s9.extra is unexpected" in text
    assert "s1.pathway0_stem.bn.bias has shape [5], not [8]" in text
    assert "\n" not in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_network_raise() -> None:
    with pytest.raises(UserError, match=r"has shape .*, not"):
        load_pretrained(build("slow_r50", width=8), draw_weights(CASES["i3d_8x8_r50_w8"]))
    with pytest.raises(UserError, match="another network"):
        load_pretrained(build("slow_r50", width=8), {"fc1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown source 'tensorflow'"):
        load_pretrained(build("slow_r50", width=8), {"fc1.weight": torch.zeros(1)}, "tensorflow")


# how trainers wrap a state dict in a file
CONTAINERS = {
    "torch.compile of DDP": lambda state: {"state_dict": prefixed("_orig_mod.module.", state)},
    "DDP of torch.compile": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "DDP twice": lambda state: prefixed("module.module.", state),
    "FSDP": lambda state: prefixed("_fsdp_wrapped_module.", state),
    "a compiled part": lambda state: {
        re.sub(r"^(\w+\.)", r"\1_orig_mod.", name): tensor for name, tensor in state.items()
    },
    "Lightning": lambda state: {
        "state_dict": {**prefixed("model.", state), "loss.weight": torch.ones(8), "val_acc.total": torch.tensor(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}}],
        "pytorch-lightning_version": "2.5",
    },
    "Lightning, compiled": lambda state: {"state_dict": prefixed("net._orig_mod.", state)},
    "AveragedModel": lambda state: {**prefixed("module.", state), "n_averaged": torch.tensor(7)},
    "timm": lambda state: {"state_dict_ema": state, "epoch": 3, "metric": 76.1},
    "torchvision": lambda state: {"model_ema": {**prefixed("module.", state), "n_averaged": torch.tensor(7)}},
    "mmengine": lambda state: {"ema_state_dict": prefixed("module.", state), "meta": {"epoch": 3}},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None, "global_steps": 4},
    "nested": lambda state: {"state_dict": {"model": prefixed("net.", state)}},
    "deeply nested": lambda state: {"checkpoint": {"trainer": [{"ema": {"shadow": state}}]}},
    "MoCo": lambda state: {"state_dict": prefixed("module.encoder_q.", state), "queue": torch.zeros(4, 4)},
    "a distilled student": lambda state: {"student": state, "loss": {"temperature": torch.tensor(2.0)}},
    "parameters": lambda state: {"model": {name: nn.Parameter(t, False) for name, t in state.items()}},
    "arrays": lambda state: {"params": {name: tensor.numpy() for name, tensor in state.items()}},
}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """The weights of one network with the names of each source."""
    state = slowfast_small(5, width=8).state_dict()
    return {
        source: {theirs: state[ours] for theirs, ours in source_names(slowfast_small(5, width=8), source).items()}
        for source in ("mgvideo", "pyslowfast", "pytorchvideo")
    }


@pytest.mark.parametrize("source", ["mgvideo", "pyslowfast", "pytorchvideo"])
@pytest.mark.parametrize("trainer", CONTAINERS)
def test_weights_are_found_in_wrappers_and_containers(
    trainer: str, source: str, states: dict[str, dict[str, Tensor]]
) -> None:
    model = slowfast_small(5, width=8)
    summary = load_pretrained(model, CONTAINERS[trainer](states[source]))
    assert_loaded(model, states["mgvideo"])
    assert summary.startswith(f"{len(states['mgvideo'])} tensors from the given state dict")
    assert f"with names of {source}" in summary


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_summary_names_what_was_loaded_and_what_was_not_used(states: dict[str, dict[str, Tensor]]) -> None:
    count = len(states["mgvideo"])
    summary = load_pretrained(slowfast_small(5, width=8), CONTAINERS["Lightning"](states["pyslowfast"]))
    assert summary == (
        f"{count} tensors from the given state dict, under state_dict.model, with names of pyslowfast; "
        "not used: state_dict.loss, state_dict.val_acc, optimizer_states"
    )
    assert load_pretrained(slowfast_small(5, width=8), states["mgvideo"]) == (
        f"{count} tensors from the given state dict, with names of mgvideo"
    )


@pytest.mark.parametrize(
    ("first", "second", "loaded"),
    [
        ("model", "model_ema", "model_ema"),
        ("state_dict_ema", "state_dict", "state_dict_ema"),
        ("student.backbone", "teacher.backbone", "teacher.backbone"),
        ("encoder_q", "encoder_k", "encoder_q"),
        ("model", "swa_model", "swa_model"),
        ("rgb", "flow", "rgb"),
    ],
)
def test_one_of_several_copies_is_chosen_by_rule_or_by_name(
    first: str, second: str, loaded: str, states: dict[str, dict[str, Tensor]]
) -> None:
    state = states["mgvideo"]
    copies = {first: state, second: {name: tensor + 1 for name, tensor in state.items()}}
    content = {"epoch": 1, **{f"{key}.{name}": t for key, copy in copies.items() for name, t in copy.items()}}
    model, other = slowfast_small(5, width=8), first if loaded == second else second
    summary = load_pretrained(model, content)
    assert_loaded(model, copies[loaded])
    assert f"under {loaded}, " in summary
    assert f"other copies of this network: {other} (init_from_key=NAME chooses one)" in summary
    assert f"under {other}, " in load_pretrained(model, content, key=other.split(".")[0])
    assert_loaded(model, copies[other])
    with pytest.raises(UserError, match=f"init_from_key=none: .* but in {first}, {second}"):
        load_pretrained(model, content, key="none")


def test_average_without_buffers_is_skipped(states: dict[str, dict[str, Tensor]]) -> None:
    state = states["mgvideo"]
    average = {name: tensor + 1 for name, tensor in state.items() if "running" not in name}
    model = slowfast_small(5, width=8)
    summary = load_pretrained(model, {"model": state, "ema": average})
    assert_loaded(model, state)
    assert "ema is skipped: ema." in summary
    assert "is missing" in summary


def test_head_beside_the_body_is_loaded_and_a_missing_one_logged(
    states: dict[str, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    state = states["mgvideo"]
    body = prefixed("backbone.", {name: tensor for name, tensor in state.items() if not name.startswith("head.")})
    head = {"cls_head.fc_cls.weight": state["head.fc.weight"], "cls_head.fc_cls.bias": state["head.fc.bias"]}
    model = slowfast_small(5, width=8)
    assert "the head is state_dict.cls_head.fc_cls" in load_pretrained(model, {"state_dict": {**body, **head}})
    assert_loaded(model, state)
    assert not caplog.records
    initial_weight = model.head.fc.weight.clone()
    other = {name: torch.cat([tensor, tensor]) for name, tensor in head.items()}
    for beside in (
        {},
        other,
        {"projector.0.weight": torch.zeros(5, initial_weight.shape[1]), "projector.0.bias": torch.zeros(5)},
    ):
        caplog.clear()
        assert "keeps its own" in load_pretrained(model, {"encoder": body, **beside})
        assert [record.message.endswith("keeps its own") for record in caplog.records] == [True]
        assert torch.equal(model.head.fc.weight, initial_weight)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("i3d_r101", "i3d_r50"), ("i3d_nln_r50", "i3d_r50"), ("i3d_r50", "i3d_nln_r50")]
)
@pytest.mark.parametrize("source", ["mgvideo", "pyslowfast", "caffe2", "pytorchvideo"])
def test_incomplete_network_is_not_loaded(theirs: str, ours: str, source: str) -> None:
    other, model = build(theirs, width=8), build(ours, width=8)
    state = other.state_dict()
    content = {
        "epoch": 1,
        "state_dict": {name: state[our_name] for name, our_name in source_names(other, source).items()},
    }
    with pytest.raises(UserError, match="does not fit this network"):
        load_pretrained(model, content)


def test_weights_that_are_not_finite_or_integers_raise(states: dict[str, dict[str, Tensor]]) -> None:
    for name, wrong in (("head.fc.weight", torch.nan), ("slow.stem.bn.running_var", torch.inf)):
        content = {**states["mgvideo"], name: torch.full_like(states["mgvideo"][name], wrong)}
        with pytest.raises(UserError, match=f"{name} has values that are not finite"):
            load_pretrained(slowfast_small(5, width=8), content)
    compressed = {name: tensor.to(torch.int8) for name, tensor in states["mgvideo"].items()}
    with pytest.raises(UserError, match="is int8, as in a quantised network"):
        load_pretrained(slowfast_small(5, width=8), compressed)


class Command:
    """Pickles as a call that creates a file, as malicious files do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_code_in_a_file_raises_and_is_not_run(tmp_path: Path) -> None:
    content = {"blobs": {"conv1_w": np.zeros(2)}, "evil": Command(tmp_path / "ran")}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "model.pyth")
    for name in ("model.pkl", "model.pyth"):
        with pytest.raises(UserError, match="cannot read weights"):
            load_pretrained(build("slow_r50", width=8), tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), pickle.dumps({"blobs": {}})])
def test_files_that_are_no_checkpoints_raise(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pkl"):
        load_pretrained(build("slow_r50", width=8), tmp_path / "model.pkl")


def test_missing_file_and_unknown_name_raise(tmp_path: Path) -> None:
    for weights_name in (tmp_path / "none.pyth", "R2Plus1D_18_Weights.NONE", "None_Weights.NONE"):
        with pytest.raises(UserError, match="cannot read weights from"):
            load_pretrained(build("slow_r50", width=8), weights_name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["source"] == "pyslowfast"])
def test_export_has_pyslowfasts_names(name: str) -> None:
    theirs = draw_weights(CASES[name])
    model = build_case(name)
    load_pretrained(model, theirs)
    exported = export_pyslowfast(model)["model_state"]
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in exported.items())


def test_export_of_r2plus1d() -> None:
    theirs = draw_weights(CASES["ptv_r2plus1d_16x4_r50_w8"])
    model = build("r2plus1d_r50", width=8)
    load_pretrained(model, theirs)
    exported = export_pyslowfast(model)
    assert exported["model_state"].keys() == {f"model.{name}" for name in theirs}
    load_pretrained(build("r2plus1d_r50", width=8), exported["model_state"])
    with pytest.raises(UserError, match="PySlowFast has no"):
        export_pyslowfast(build("r2plus1d_small"))
