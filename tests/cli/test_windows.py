"""Sliding windows of `mgvideo predict`, with a network whose score is exactly the share of white frames."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import error_line
from torch import Tensor, nn
from videos import write_video

from mgvideo.cli import app, predict
from mgvideo.cli.trained import Trained
from mgvideo.cli.windows import cut_into_windows

CLASSES = ("black", "white")


class ShareOfWhite(nn.Module):
    """Gives the class `white` the mean of the pixels, 0 to 1, as its score after softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.clips = 0

    def forward(self, clips: Tensor) -> Tensor:
        self.clips += len(clips)
        white = clips.mean((1, 2, 3, 4))
        return torch.stack([1 - white, white], 1).clamp(min=1e-6).log()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ShareOfWhite:
    model = ShareOfWhite()

    def load_trained(ckpt: str, overrides: list[str], _: type) -> Trained:
        cfg = app.compose_config("run", ["model=slowfast_small", "dataset=kinetics400", *overrides])
        cfg.model.num_classes = 2
        return Trained(model, cfg, ckpt, None, "loaded")

    monkeypatch.setattr(predict, "load_trained", load_trained)
    (tmp_path / "names.txt").write_text("black\nwhite\n")
    return model


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    keys = ["base.num_frames=8", "base.frame_stride=1", "normalize.mean=[0,0,0]", "normalize.std=[1,1,1]"]
    keys += ["precision=fp32", "loader.num_workers=0", "size=32", "crops=1", f"classes={tmp_path / 'names.txt'}"]
    return ["ckpt=unused", *keys, "format=csv"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Black for two seconds at 10 frames a second, then white for five seconds at 5 frames a second."""

    def picture(number: int, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), 255 * (number >= 20), np.uint8)

    # keyframes at neither half's start: reading must not depend on them
    options = {"g": "7", "crf": "1"}
    return write_video(
        tmp_path / "two.mp4", frames=45, fps=10, picture=picture, options=options, times=lambda i: i + max(0, i - 20)
    )


def read_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_windows_change_at_the_boundary_of_two_classes(
    network: ShareOfWhite, arguments: list[str], video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main([str(video), *arguments, "window=1", "step=0.5"])
    captured = capsys.readouterr()
    rows = read_rows(captured.out)
    starts = [float(row["start"]) for row in rows]
    assert starts == [0.5 * k for k in range(13)]
    assert [float(row["end"]) for row in rows] == [start + 1 for start in starts]
    assert [row["class_1"] for row in rows] == ["black"] * 4 + ["white"] * 9
    shares = [float(row["score_1"]) for row in rows]
    assert shares[3] == pytest.approx(5 / 8, abs=0.01), "1.5 to 2.5 s: five black frames, then three white ones"
    assert np.delete(shares, 3) == pytest.approx(1, abs=0.01)
    assert network.clips == len(rows), "each window is read once"
    assert "a clip lasts 1.24 s" in captured.err


def test_a_last_window_ends_with_the_video(
    network: ShareOfWhite, arguments: list[str], video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main([str(video), *arguments[:-1], "format=json", "window=2.5", "top=1"])
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["start"], entry["end"]) for entry in entries] == [(0, 2.5), (2.5, 5), (4.5, 7)]
    assert entries[2]["classes"][0]["class"] == "white"


def test_a_video_that_cannot_be_read_has_a_line_without_scores(
    network: ShareOfWhite, arguments: list[str], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mp4").write_text("this is no video")
    for form in ("csv", "table"):
        with pytest.raises(SystemExit):
            predict.main([str(tmp_path / "bad.mp4"), str(video), *arguments[:-1], f"format={form}", "window=3"])
        captured = capsys.readouterr()
        assert f"error: {tmp_path / 'bad.mp4'}: " in captured.err
        if form == "csv":
            bad, *good = read_rows(captured.out)
            assert (bad["start"], bad["class_1"], len(good)) == ("", "", 3)
        else:
            assert "4.00–7.00" in captured.out
            assert "inf" not in captured.out


def test_csv_of_whole_videos(
    network: ShareOfWhite, arguments: list[str], video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main([str(video), *arguments, "clips=2"])
    (row,) = read_rows(capsys.readouterr().out)
    assert row == {
        "video": str(video),
        "class_1": "black",
        "score_1": "0.5000",
        "class_2": "white",
        "score_2": "0.5000",
    }


@pytest.mark.parametrize(
    ("end", "length", "step", "expected"),
    [
        (4, 2, 2, [(0, 2), (2, 4)]),
        (1.5, 2, 1, [(0, 1.5)]),
        (4.0005, 2, 2, [(0, 2), (2, 4)]),  # rounding is no reason for another window
        (5, 1, 3, [(0, 1), (3, 4)]),  # gaps are as wished
        (5, 2, 2, [(0, 2), (2, 4), (3, 5)]),
    ],
)
def test_windows_of_a_length(end: float, length: float, step: float, expected: list[tuple[float, float]]) -> None:
    assert cut_into_windows(0, end, length, step) == expected
    shifted = cut_into_windows(10, 10 + end, length, step)
    assert shifted == [(pytest.approx(10 + a), pytest.approx(10 + b)) for a, b in expected]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["step=1"], "add window=SECONDS"),
        (["window=0"], "window=0.0: give more than 0"),
        (["window=1", "out=drawn"], "out draws the classes of whole videos"),
    ],
)
def test_wrong_keys_are_one_line(keys: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(predict.main, ["x.mp4", "ckpt=w.pth", *keys], capsys)
