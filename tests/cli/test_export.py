"""`mgvideo export`: files of every family run without mgvideo and give the network's logits."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from refusals import error_line
from torch import nn

from mgvideo.cli import export
from mgvideo.cli.export import main
from mgvideo.engine.precision import Normalize
from mgvideo.models.small import i3d_nln_small, i3d_small, r2plus1d_small, slowfast_small

GRID = ["base.num_frames=8", "base.crop_size=32", "base.short_side=[36,40]", "normalize.mean=[0.4,0.5,0.6]"]
NETWORKS = {
    "i3d_small": i3d_small(5, width=4),
    "i3d_nln_small": i3d_nln_small(5, width=4),
    "r2plus1d_small": r2plus1d_small(5, width=4),
    "slowfast_small": slowfast_small(5, width=8),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights NAME.pth of each network."""
    folder = tmp_path_factory.mktemp("weights")
    for name, model in NETWORKS.items():
        model.eval()
        for module in model.modules():  # freshly initialised networks give almost the same logits for all clips
            if isinstance(module, nn.Linear | nn.BatchNorm3d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return folder


def run_export(name: str, weights: Path, out: Path, *arguments: str) -> None:
    width = 8 if name == "slowfast_small" else 4
    main([f"ckpt={weights / name}.pth", f"model={name}", f"model.width={width}", *GRID, f"out={out}", *arguments])


def logits(model: nn.Module, clips: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(clips)


@pytest.mark.parametrize("name", ["r2plus1d_small", "slowfast_small"])
@pytest.mark.slow
def test_a_dynamic_torch_program_accepts_any_grid(
    name: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_export(name, weights, tmp_path / "net.pt2", "dynamic=true")
    output = capsys.readouterr().out
    assert output.count("check on") == 2
    assert ("the number of frames is fixed" in output) == (name == "slowfast_small")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for shape in [(1, 3, 8, 32, 32), (4, 3, 8, 57, 40), (1, 3, 5, 48, 48)]:
        clips = torch.randn(shape)
        if name == "slowfast_small" and shape[2] != 8:
            with pytest.raises(Exception, match="8"):
                program(clips)
            continue
        torch.testing.assert_close(program(clips), logits(NETWORKS[name], clips))


def test_a_program_without_dynamic_shapes_accepts_only_its_shape(weights: Path, tmp_path: Path) -> None:
    run_export("r2plus1d_small", weights, tmp_path / "net.pt2", "batch=2", "frames=4")
    program = torch.export.load(tmp_path / "net.pt2").module()
    clips = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(program(clips), logits(NETWORKS["r2plus1d_small"], clips))
    with pytest.raises(Exception, match="32"):
        program(torch.randn(2, 3, 4, 48, 48))


@pytest.mark.slow
def test_onnx_with_normalisation_accepts_uint8_frames(weights: Path, tmp_path: Path) -> None:
    run_export("slowfast_small", weights, tmp_path / "net.onnx", "dynamic=true", "normalize=true")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
    assert (inputs.name, inputs.type, outputs.name) == ("clips", "tensor(uint8)", "logits")
    assert (inputs.shape[1], inputs.shape[4]) == (8, 3), "frames and channels are fixed"
    frames = torch.randint(0, 256, (3, 8, 40, 56, 3), dtype=torch.uint8)
    normal = Normalize((0.4, 0.5, 0.6), (0.225,) * 3)(frames)
    onnx_logits = torch.from_numpy(session.run(None, {"clips": frames.numpy()})[0])
    torch.testing.assert_close(onnx_logits, logits(NETWORKS["slowfast_small"], normal), atol=1e-4, rtol=1e-4)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, {"clips": frames[:, :7].numpy()})


@pytest.mark.slow
def test_a_fixed_onnx_file_accepts_only_its_grid(weights: Path, tmp_path: Path) -> None:
    run_export("slowfast_small", weights, tmp_path / "net.onnx", "format=onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 8, 32, 32]
    clips = torch.randn(1, 3, 8, 32, 32)
    onnx_logits = torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])
    torch.testing.assert_close(onnx_logits, logits(NETWORKS["slowfast_small"], clips), atol=1e-4, rtol=1e-4)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, {"clips": clips.repeat(2, 1, 1, 1, 1).numpy()})


@pytest.mark.slow
def test_onnx_of_a_network_with_attention(weights: Path, tmp_path: Path) -> None:
    run_export("i3d_nln_small", weights, tmp_path / "net.onnx", "dynamic=true")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    clips = torch.randn(3, 3, 10, 48, 32)
    onnx_logits = torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])
    torch.testing.assert_close(onnx_logits, logits(NETWORKS["i3d_nln_small"], clips), atol=1e-4, rtol=1e-4)


def test_nothing_is_written_if_the_logits_differ(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit):
        run_export("i3d_small", weights, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    line = error_line(main, ["ckpt=any", f"out={tmp_path}/net.onnx"], capsys)
    assert line == "error: format=onnx requires onnxscript: pip install onnx onnxruntime onnxscript"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out is not set"),
        (["out=net.tflite"], "NAME.pt2"),
        (["out=net.pt2", "format=onnx"], "another suffix"),
        (["out=net.pt2", "format=pdf"], "choose one of torch, onnx"),
        (["out=net.pt2"], "ckpt is not set"),
        (["out=net.pt2", "ckpt=/nowhere"], "/nowhere"),
        (["out=net.pt2", "batch=0"], "batch=0"),
        (["out=net.pt2", "dynamic=maybe"], "dynamic"),
    ],
)
def test_bad_input_gives_one_error_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(main, arguments, capsys)
    assert line.startswith("error: ")
    assert message in line


def test_an_unwritable_folder_is_reported_before_the_work_starts(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_export("i3d_small", weights, Path("/proc/net.pt2"))
    captured = capsys.readouterr()
    assert "cannot write out=/proc/net.pt2" in captured.err
    assert captured.out == "", "reported before tracing starts"
