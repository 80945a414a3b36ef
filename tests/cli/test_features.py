"""`mgvideo features`: pooled features, their table, and videos that cannot be read."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import error_line
from training import KNOBS

from mgvideo.cli import features, predict
from mgvideo.datasets.motion import make_motion
from mgvideo.models.features import find_classifier
from mgvideo.models.small import slowfast_small

NETWORK = ["model=slowfast_small", "model.width=8", "base.num_frames=8", "base.frame_stride=2", "precision=fp32"]
NETWORK += ["loader.num_workers=0", "size=32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = slowfast_small(5, width=8)
    torch.nn.init.normal_(find_classifier(model).weight)  # as initialised, all scores are almost equal
    file = tmp_path_factory.mktemp("features") / "weights.pth"
    torch.save(model.state_dict(), file)
    return file


@pytest.fixture
def folder(motion_root: str, tmp_path: Path) -> Path:
    """Two videos of the class `walk`, one without a folder, and one that is broken."""
    videos = make_motion(motion_root, KNOBS) / "val"
    (tmp_path / "in/train/walk").mkdir(parents=True)
    shutil.copy(videos / "00000.mp4", tmp_path / "in/train/walk/a.mp4")
    shutil.copy(videos / "00001.mp4", tmp_path / "in/train/walk/b.mp4")
    shutil.copy(videos / "00002.mp4", tmp_path / "in/c.mp4")
    (tmp_path / "in/broken.mp4").write_text("this is no video")
    return tmp_path


def test_features_times_the_classifier_are_the_scores_of_predict(
    weights: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = make_motion(motion_root, KNOBS) / "val/00003.mp4"
    arguments = [str(video), f"ckpt={weights}", *NETWORK, "clips=1", "crops=1"]
    features.main([*arguments, f"out={tmp_path}"])
    capsys.readouterr()
    predict.main([*arguments, "format=json"])
    (entry,) = json.loads(capsys.readouterr().out)
    scores = torch.tensor([c["score"] for c in sorted(entry["classes"], key=lambda c: c["label"])])
    state = torch.load(weights)
    vector = torch.from_numpy(np.load(tmp_path / "features.npy"))
    logits = vector @ state["head.fc.weight"].T + state["head.fc.bias"]
    torch.testing.assert_close(logits.softmax(1)[0], scores)
    assert scores.max() > 0.3, "the scores say something"


def test_rows_of_the_table_are_those_of_the_array(
    weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str, code: int | None = None) -> tuple[np.ndarray, list[dict[str, str]]]:
        arguments = [*words, f"ckpt={weights}", *NETWORK, f"out={folder / 'out'}", "clips=2", "crops=3"]
        if code is None:
            features.main(arguments)
        else:
            with pytest.raises(SystemExit) as leaving:
                features.main(arguments)
            assert leaving.value.code == code
        with open(folder / "out/features.csv", encoding="utf-8", newline="") as table:
            return np.load(folder / "out/features.npy"), list(csv.DictReader(table))

    array, rows = run(str(folder / "in"), code=1)
    assert f"error: {folder / 'in/broken.mp4'}: " in capsys.readouterr().err
    by_name = {Path(row["video"]).name: (row["label"], row["seconds"], row["views"]) for row in rows}
    seconds = f"{20 / 24:.3f}"
    assert by_name == {"c.mp4": ("", seconds, "6"), "a.mp4": ("walk", seconds, "6"), "b.mp4": ("walk", seconds, "6")}
    assert array.dtype == np.float32
    assert len(array) == 3
    assert np.isfinite(array).all()
    (alone,), (row,) = run(str(folder / "in/train/walk/b.mp4"))
    assert row["label"] == ""
    number = [Path(row["video"]).name for row in rows].index("b.mp4")
    np.testing.assert_allclose(array[number], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.mp4", "ckpt=w.pth"], "out is not set"),
        (["ckpt=w.pth", "out=f"], "no video given"),
        (["x.mp4", "ckpt=w.pth", "out=https://host/f"], "only output_dir may be a URL"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(features.main, arguments, capsys)
