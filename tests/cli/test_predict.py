"""`mgvideo predict` on the checkpoints of a real run and on other weights."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from refusals import error_line
from torch.nn.functional import interpolate
from training import KNOBS, ROOT, TINY, run_program
from web import serve_folder

from mgvideo.cli import predict
from mgvideo.cli.overlay import HeatMaps
from mgvideo.cli.predict import main
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import CLASSES, make_motion
from mgvideo.engine.precision import Normalize
from mgvideo.models.naming import source_names
from mgvideo.models.small import r2plus1d_small, slowfast_small

ONE_VIEW = ["clips=1", "crops=1", "size=32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("predict")
    command = [*TINY, f"dataset.root={motion_root}", "output_dir=out", "schedule=baseline", "precision=fp32"]
    command += ["base.epochs=0.75", "base.lr_milestones=[]"]
    result = run_program(*command, "test.num_clips=2", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out"


@pytest.fixture
def videos(motion_root: str) -> Path:
    return make_motion(motion_root, KNOBS) / "val"


def run_predict(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    main([*map(str, arguments), "format=json"])
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_path_gives_the_scores_of_the_runs_test(
    trained: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = max((trained / "checkpoints").glob("step_*.pt"))
    entries = run_predict([videos, f"ckpt={newest}", "top=8"], capsys)
    assert [Path(entry["video"]).name for entry in entries] == [f"{i:05d}.mp4" for i in range(KNOBS.val)]
    assert {c["class"] for c in entries[0]["classes"]} == set(CLASSES)
    assert (trained / "classes.txt").read_text().splitlines() == list(CLASSES)
    assert all(sum(c["score"] for c in entry["classes"]) == pytest.approx(1, abs=1e-4) for entry in entries)
    ranks = [[c["label"] for c in entry["classes"]].index(i % 8) for i, entry in enumerate(entries)]
    test = json.loads((trained / "test.json").read_text())
    assert 100 * np.mean([rank < 1 for rank in ranks]) == pytest.approx(test["top1"])
    assert 100 * np.mean([rank < 5 for rank in ranks]) == pytest.approx(test["top5"])


def test_a_run_folder_selects_its_best_checkpoint_and_keys_change_the_views(
    trained: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = videos / "00001.mp4"
    best = run_predict([video, f"ckpt={trained / 'checkpoints/best.pt'}"], capsys)
    assert run_predict([video, f"ckpt={trained}"], capsys) == best
    assert len(best[0]["classes"]) == 5
    for changed in (["clips=1"], ["crops=1"], ["size=48"], ["base.frame_stride=1"], ["normalize.mean=[0,0,0]"]):
        assert run_predict([video, f"ckpt={trained}", *changed], capsys) != best, changed


@pytest.mark.slow
def test_bad_videos_are_reported_and_the_others_are_scored(trained: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    shutil.copy(videos / "00000.mp4", tmp_path / "in/deep/good.mp4")
    (tmp_path / "in/text.mp4").write_text("this is no video")
    command = [
        sys.executable,
        str(ROOT / "tools/predict.py"),
        "in",
        "gone.mp4",
        f"ckpt={trained}",
        "top=2",
        "out=drawn",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == ["in/text.mp4", "gone.mp4"]
    assert "No such file" in errors[1]
    rows = result.stdout.splitlines()
    assert sum("in/deep/good.mp4" in row for row in rows) == 1
    assert sum(any(name in row for name in CLASSES) for row in rows) == 2
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "drawn").rglob("*.mp4")] == ["drawn/deep/good.mp4"]


def frames_of(path: Path) -> torch.Tensor:
    with PyAV().open(str(path)) as video:
        assert (video.height, video.width, video.times[1]) == (48, 64, 1 / 24)
        assert video.frames in (20, 40)
        return video.read(range(video.frames)).float()


def write_frames(path: Path, frames: torch.Tensor) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames.byte().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_videos_are_written_with_their_classes_and_heat_maps(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = frames_of(videos / "00002.mp4")
    drawn = {}
    for cam in ("false", "true"):
        out = tmp_path / cam
        run_predict([videos / "00002.mp4", f"ckpt={trained}", "top=1", f"out={out}", f"cam={cam}", *ONE_VIEW], capsys)
        drawn[cam] = (frames_of(out / "00002.mp4") - original).abs().mean(-1)
    assert drawn["false"][:, :8, 4:40].mean() > 20, "the label is drawn"
    assert drawn["false"][:, 20:].mean() < 5, "and nothing else is"
    assert drawn["true"][:, 20:].amax() > 25, "the heat map is drawn"
    assert drawn["true"][:, 20:].mean() > 2 * drawn["false"][:, 20:].mean()


def test_an_output_that_cannot_be_written_is_named(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, still = tmp_path / "good.mp4", tmp_path / "still.mkv"
    shutil.copy(videos / "00000.mp4", good)
    with av.open(str(good)) as source, av.open(str(still), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.pts = stream, min(packet.pts, 512 * 9)
                packet.dts = min(packet.dts, packet.pts)
                target.mux(packet)
    (tmp_path / "out/good.mp4").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main([str(good), str(still), f"ckpt={trained}", f"out={tmp_path / 'out'}", *ONE_VIEW])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {good}: cannot be written to {tmp_path / 'out/good.mp4'}: Is a directory"]
    (drawn,) = (tmp_path / "out").glob("still.*")
    with PyAV().open(str(still)) as source, PyAV().open(str(drawn)) as target:
        assert target.frames == source.frames, "frames with repeated timestamps are kept"


@pytest.fixture
def heats(monkeypatch: pytest.MonkeyPatch) -> list[HeatMaps]:
    """Record the heat maps that are drawn, in order."""
    drawn: list[HeatMaps] = []
    original = predict.annotate_video

    def annotate_video(source: str, target: Path, lines: list[str], heat: HeatMaps) -> None:
        drawn.append(heat)
        original(source, target, lines, heat)

    monkeypatch.setattr(predict, "annotate_video", annotate_video)
    return drawn


def test_every_window_of_a_long_video_has_its_own_heat_map(
    trained: Path, videos: Path, tmp_path: Path, heats: list[HeatMaps], capsys: pytest.CaptureFixture[str]
) -> None:
    original = frames_of(videos / "00002.mp4")
    twice = tmp_path / "twice.mp4"
    write_frames(twice, torch.cat([original, original]))
    windows = [f"out={tmp_path / 'out'}", "base.num_frames=5", "top=1", "cam=true", *ONE_VIEW]  # of 10 frames
    run_predict([videos / "00002.mp4", twice, f"ckpt={trained}", *windows], capsys)
    once, both = heats
    assert (once.starts, both.starts) == ([0, 10], [0, 10, 20, 30])
    assert (once.maps[0] - once.maps[1]).abs().mean() > 0.02, "windows differ"
    error = (both.maps - once.maps.repeat(2, 1, 1, 1)).abs().mean()  # the second file is re-encoded
    assert error < (once.maps[0] - once.maps[1]).abs().mean() / 2, f"{error}"
    painted = (frames_of(tmp_path / "out/twice.mp4") - original.repeat(2, 1, 1, 1))[:, 20:].abs().mean((1, 2, 3))
    assert len(painted) == 40
    assert painted.min() > 5


def test_multi_label_scores_are_sigmoids_with_the_maximum_over_views(
    trained: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(*arguments: str) -> torch.Tensor:
        (entry,) = run_predict([videos / "00003.mp4", f"ckpt={trained}", "top=8", "clips=1", *arguments], capsys)
        return torch.tensor([c["score"] for c in sorted(entry["classes"], key=lambda c: c["label"])])

    one, several = (scores("dataset.task=multi_label", f"crops={crops}") for crops in (1, 3))
    torch.testing.assert_close(one.logit().softmax(0), scores("crops=1"), atol=1e-4, rtol=1e-3)
    assert (several >= one - 1e-6).all(), "the middle crop is one of the three"
    assert (several > one + 1e-4).any()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(r2plus1d_small(5, width=4).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_other_weights_determine_the_number_of_classes(
    foreign: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["model=r2plus1d_small", "model.width=4", "base.num_frames=8", "base.frame_stride=2", *ONE_VIEW]
    main([str(videos / "00000.mp4"), f"ckpt={foreign}", *network, "format=json"])
    captured = capsys.readouterr()
    assert {c["class"] for c in json.loads(captured.out)[0]["classes"]} == set("01234")
    assert "classes=FILE" in captured.err
    names = foreign.with_name("names.txt")
    names.write_text("walk\nrun\njump\nfly\nswim\n")
    (entry,) = run_predict([videos / "00000.mp4", f"ckpt={foreign}", *network, f"classes={names}"], capsys)
    assert {c["class"] for c in entry["classes"]} == {"walk", "run", "jump", "fly", "swim"}


def test_init_from_key_selects_one_of_several_networks_in_a_file(
    foreign: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(foreign)
    other = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": other}, tmp_path / "both=1, [2].pth")
    torch.save({"module": other}, tmp_path / "other.pth")
    network = ["model=r2plus1d_small", "model.width=4", "base.num_frames=8", "base.frame_stride=2", *ONE_VIEW]

    def scores(name: Path, *more: str) -> list[dict[str, Any]]:
        return run_predict([videos / "00000.mp4", f"ckpt={name}", *network, *more], capsys)

    both = tmp_path / "both=1, [2].pth"
    assert scores(both) == scores(tmp_path / "other.pth")
    assert scores(both, "init_from_key=model") == scores(foreign) != scores(both)


def test_weights_of_other_clips_cause_a_warning(
    foreign: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["model=r2plus1d_small", "model.width=4", "base.num_frames=8", "published_clip=[16,4,32]", *ONE_VIEW]
    main([str(videos / "00000.mp4"), f"ckpt={foreign}", *network])
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the network")]
    assert "set base.frame_stride=4; base.frame_stride=2 keeps" in warning


SEGMENTS = (1, 3, 6, 8, 11, 13, 15, 18)  # the middles of eight segments of 20 frames, as in PySlowFast


def test_something_something_clips_are_sampled_by_segments(
    foreign: Path, videos: Path, tmp_path: Path, heats: list[HeatMaps], capsys: pytest.CaptureFixture[str]
) -> None:
    network = [
        "model=r2plus1d_small",
        "model.width=4",
        "dataset=ssv2",
        "base.num_frames=8",
        "precision=fp32",
        *ONE_VIEW,
    ]
    for stride in (1, 4):  # the stride has no effect
        command = [videos / "00001.mp4", f"ckpt={foreign}", *network, f"base.frame_stride={stride}", "cam=true"]
        (entry,) = run_predict([*command, f"out={tmp_path / 'out'}"], capsys)
    torch.testing.assert_close(heats[0].maps, heats[1].maps)
    assert [(heat.starts, heat.span) for heat in heats] == [([0], 20)] * 2, "one window covers the whole video"
    with PyAV().open(str(videos / "00001.mp4")) as video:
        scaled = interpolate(video.read(SEGMENTS).permute(0, 3, 1, 2), (32, 42), mode="bilinear")  # not antialiased
        clip = scaled[..., 5:37].permute(0, 2, 3, 1)
    model = r2plus1d_small(5, width=4)
    model.load_state_dict(torch.load(foreign))
    with torch.no_grad():
        logits = model.eval()(Normalize((0.45,) * 3, (0.225,) * 3)(clip[None]))[0]
    scores = {c["label"]: c["score"] for c in entry["classes"]}
    expected = dict(enumerate(logits.softmax(0).tolist()))
    assert scores == pytest.approx(expected, abs=1e-5)
    (at_stride,) = run_predict(
        [videos / "00001.mp4", f"ckpt={foreign}", *network, "dataset.val.segments=false"], capsys
    )
    assert at_stride != entry, "the key of the dataset decides, not its name"


@pytest.mark.parametrize("source", ["caffe2", "pyslowfast", "pytorchvideo"])
def test_weights_of_a_model_zoo_give_the_same_predictions(
    source: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = slowfast_small(5, width=8)
    state = model.state_dict()
    torch.save(state, tmp_path / "ours.pth")
    named = {theirs: state[ours] for theirs, ours in source_names(model, source).items()}
    if source == "caffe2":
        blobs = {name: tensor.numpy() for name, tensor in named.items() if not name.endswith("num_batches_tracked")}
        (tmp_path / "theirs.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, "lr": np.float32(0.1)}}, protocol=2))
    else:
        torch.save({"model_state": named}, tmp_path / "theirs.pkl")
    network = ["model=slowfast_small", "model.width=8", "base.num_frames=8", "base.frame_stride=2", *ONE_VIEW]
    ours, theirs = (
        run_predict([videos / "00000.mp4", f"ckpt={tmp_path / name}", *network], capsys)
        for name in ("ours.pth", "theirs.pkl")
    )
    assert ours == theirs


def test_videos_weights_and_class_names_may_be_urls(
    foreign: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    shutil.copy(videos / "00000.mp4", foreign.parent / "a=b.mp4")
    (foreign.parent / "names.txt").write_text("walk\nrun\njump\nfly\nswim\n")
    network = ["model=r2plus1d_small", "model.width=4", "base.num_frames=8", "base.frame_stride=2", *ONE_VIEW]
    with serve_folder(foreign.parent) as (address, _):
        command = [f"{address}/a=b.mp4", f"ckpt={address}/weights.pth", f"classes={address}/names.txt", *network]
        (remote,) = run_predict([*command, f"out={tmp_path / 'drawn'}", "cam=true"], capsys)
        message = error_line(main, [str(videos / "00000.mp4"), f"ckpt={address}/gone.pth", *network], capsys)
        assert "gone.pth: " in message
        assert "404" in message
    assert frames_of(tmp_path / "drawn/a=b.mp4").any()
    local = [f"file://{videos}/00000.mp4", f"ckpt=file://{foreign}", f"classes={foreign.parent}/names.txt", *network]
    assert run_predict(local, capsys)[0]["classes"] == remote["classes"]


def _write_invalid_checkpoint(folder: Path) -> str:
    (folder / "text.mp4").write_text("this is no checkpoint")
    return f"ckpt={folder}/text.mp4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda run, folder: [], "ckpt is not set"),
        (lambda run, folder: ["ckpt=/nowhere.pt"], "/nowhere.pt: no such file"),
        (lambda run, folder: [f"ckpt={folder}"], "this folder has no checkpoints"),
        (lambda run, folder: [_write_invalid_checkpoint(folder)], "add its network to the command"),
        (lambda run, folder: [_write_invalid_checkpoint(folder), "model=i3d_small"], "cannot read weights from"),
        (lambda run, folder: [f"ckpt={run}", "clip=3"], "did you mean clips?"),
        (lambda run, folder: [f"ckpt={run}", "base.frame_stried=3"], "did you mean base.frame_stride?"),
        (lambda run, folder: [f"ckpt={run}", "base.frame_stride=two"], "base.frame_stride"),
        (lambda run, folder: [f"ckpt={run}", "model=i3d_r50"], "already sets this group"),
        (lambda run, folder: [f"ckpt={run}", "crops=2"], "crops=2"),
        (lambda run, folder: [f"ckpt={run}", "top=0"], "top=0"),
        (lambda run, folder: [f"ckpt={run}", "cam=true"], "add out=FOLDER"),
        (lambda run, folder: [f"ckpt={run}", "classes=/nowhere.txt"], "/nowhere.txt"),
        (lambda run, folder: [f"ckpt={run}", str(folder)], "no videos in this folder"),
        (lambda run, folder: [f"ckpt={run}", "--fast"], "cannot read '--fast'"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_error_line(
    arguments: Any, message: str, trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(main, [str(videos / "00000.mp4"), *arguments(trained, tmp_path)], capsys)
    assert line.startswith("error: ")
    assert message in line


TINY_NET = """
from torch import nn

class TinyNet(nn.Module):
    def __init__(self, num_classes, average):
        super().__init__()
        self.average, self.features = average, nn.Conv3d(3, 4, (1, 5, 5), stride=(1, 2, 2))
        self.last = nn.Linear(4, num_classes)

    def forward(self, clips):
        features = self.features(clips).relu_()
        return self.last(features.mean((2, 3, 4)) if self.average else features.amax((2, 3, 4)))
"""


@pytest.mark.parametrize("average", ["true", "false"])
def test_a_custom_network_has_its_options_name_and_heat_maps_if_it_averages(
    average: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, weights, out = tmp_path / "parts", tmp_path / "weights.pt", tmp_path / "out"
    (parts / "model").mkdir(parents=True)
    (parts / f"net_{average}.py").write_text(TINY_NET)
    network = f"_target_: net_{average}.TinyNet\nnum_classes: ${{dataset.num_classes}}\naverage: {average}\n"
    (parts / "model/my_net.yaml").write_text(network)
    monkeypatch.syspath_prepend(str(parts))
    module = importlib.import_module(f"net_{average}")
    torch.save(module.TinyNet(8, True).state_dict(), weights)
    command = [str(videos / "00000.mp4"), f"ckpt={weights}", f"hydra.searchpath=[{parts}]", "model=my_net"]
    command += ["dataset=motion", f"out={out}", "cam=true", "loader.num_workers=0", *ONE_VIEW]
    if average == "true":
        main(command)
        assert f"my_net with 8 classes from {weights}" in capsys.readouterr().err
        assert (out / "00000.mp4").exists()
        return
    with pytest.raises(SystemExit):
        main(command)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cam=true: model=my_net: TinyNet has no class-activation maps")
    assert not (out / "00000.mp4").exists()


def test_a_run_folder_keeps_the_name_of_its_network(
    trained: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(videos / "00000.mp4"), f"ckpt={trained}", *ONE_VIEW])
    assert "r2plus1d_small with 8 classes from" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped_in_a_folder_and_an_error_by_path(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (run / "checkpoints/best.pt").unlink()
    newest = max((run / "checkpoints").glob("step_*.pt"))
    shutil.copy(newest, newest.with_name("step_99999999.pt"))
    (run / "checkpoints/step_99999999.sha256").write_text("0")
    main([str(videos / "00000.mp4"), f"ckpt={run}"])
    message = capsys.readouterr().err
    assert "warning: " in message
    assert f"from {newest}" in message
    with pytest.raises(SystemExit):
        main([str(videos / "00000.mp4"), f"ckpt={run}/checkpoints/step_99999999.pt"])
    assert "step_99999999.pt is damaged" in capsys.readouterr().err


def test_targets_of_a_config_beside_the_weights_need_permission(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    config = OmegaConf.load(run / "config.yaml")
    stolen = tmp_path / "stolen"
    for copies in ("shutil.copyfile", "mgvideo.storage.paths.shutil.copyfile", "${dataset.name}"):
        config.model.dropout = {"_target_": copies, "src": str(videos / "00000.mp4"), "dst": str(stolen)}
        OmegaConf.save(config, run / "config.yaml")
        line = error_line(main, [str(videos / "00000.mp4"), f"ckpt={run}"], capsys)
        assert f"model.dropout._target_={copies}" in line
    assert not stolen.exists()
    config.model.dropout = 0.0
    config.model._target_ = target = "mgvideo.models.small.R2Plus1D"
    OmegaConf.save(config, run / "config.yaml")
    assert target in error_line(main, [str(videos / "00000.mp4"), f"ckpt={run}"], capsys)
    line = error_line(main, [str(videos / "00000.mp4"), f"ckpt={run}", f"model._target_={target}"], capsys)
    assert line.startswith("error: model: "), "the target was called, with wrong arguments"


def test_no_video_is_an_error(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no video given" in error_line(main, [f"ckpt={trained}"], capsys)
