"""Test the run program with all kinds of bad video files: which ones it reports."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from fields import FIELD
from refusals import error_line
from training import TINY
from videos import DECORD, create_bad_files, write_odd_files, write_rotated, write_video

from mgvideo.cli.run import main
from mgvideo.datasets.decoders import TorchCodec
from mgvideo.errors import UserError

PLAIN = 6
RUN = [
    *(argument for argument in TINY if "knobs" not in argument),
    *("dataset=kinetics400", "dataset.num_classes=8", "loader.num_workers=0", "train.micro_batch_clips=16"),
    *("precision=fp32", "train.precise_bn_clips=0", "train.evals_per_phase=0"),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Write `good` and `bad` training files, `missing` validation files and lists; returns kind → name → path."""
    root = tmp_path_factory.mktemp("bad")
    good = {f"plain {i}": write_video(root / f"train/plain {i}.mp4", options={"g": "12"}) for i in range(PLAIN)}
    good |= write_odd_files(root / "train")
    good["rotated"] = write_rotated(root / "train/rotated.mp4", frames=40)
    good["five frames"] = write_video(root / "train/five frames.mp4", frames=5)
    good["linked"] = root / "train/linked.mp4"
    good["linked"].symlink_to(good["plain 0"])
    bad = create_bad_files(root / "train")
    forbidden = write_video(root / "train/forbidden.mp4")
    forbidden.chmod(0)
    (good if os.access(forbidden, os.R_OK) else bad)["forbidden"] = forbidden  # root can read every file
    missing = create_bad_files(root / "val")
    twice = [good["plain 0"], good["av1"], bad["text"]]
    for name, videos in (
        ("train", [*good.values(), *bad.values(), *twice]),
        ("val", [*good.values(), *missing.values()]),
    ):
        lines = [f"{path.relative_to(root)} {label % 8}\n" for label, path in enumerate(videos)]
        (root / f"{name}.csv").write_text("".join(lines))
    return {"root": {"": root}, "good": good, "bad": bad, "missing": missing}


def read_reported(folder: Path, root: Path, top: str) -> dict[str, str]:
    """Read bad_videos.csv; returns path → reason for the paths under a folder of the dataset."""
    with open(folder / "bad_videos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: row["reason"] for row in rows if Path(row["path"]).is_relative_to(root / top)}


@pytest.mark.parametrize("decoder", ["pyav", DECORD, "torchcodec"])
@pytest.mark.slow
def test_training_survives_all_bad_files_and_reports_them(
    paths: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    if decoder == "torchcodec":
        try:
            TorchCodec()
        except UserError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    root = paths["root"][""]
    more = [f"dataset.root={root}", f"decoder={decoder}", "dataset.max_bad_fraction=1", "output_dir=out"]
    main([*RUN, *more, "base.epochs=4", "base.lr_milestones=[2]"])
    reported = read_reported(tmp_path / "out", root, "train")
    assert set(reported) == {str(path) for path in paths["bad"].values()}
    assert all(reported.values()), "each with a reason"
    lost = read_reported(tmp_path / "out", root, "val")
    assert set(lost) == {str(path) for path in paths["missing"].values()}
    report = (tmp_path / "out/report.md").read_text()
    reported_lines = [line for line in report.splitlines() if line.startswith("- bad video, counted as wrong: ")]
    assert sorted(reported_lines) == sorted(
        f"- bad video, counted as wrong: {path}: {reason}" for path, reason in lost.items()
    )


@pytest.mark.parametrize("decoder", ["pyav", DECORD])
def test_training_on_ucf101_reads_every_avi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    monkeypatch.chdir(tmp_path)
    lists = Path("ucf/ucfTrainTestlist")
    lists.mkdir(parents=True)
    names = ["Jump/xvid_packed.avi", "Jump/xvid_small.avi", "Walk/h264_b.avi"] * 4
    for name in set(names):
        copy = Path("ucf/UCF-101") / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(FIELD / copy.name)
    (lists / "classInd.txt").write_text("1 Jump\n2 Walk\n")
    (lists / "trainlist01.txt").write_text("".join(f"{name} {1 + name.startswith('Walk')}\n" for name in names))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names[:3]))
    run = [word for word in RUN if not word.startswith(("dataset", "base.num_frames", "base.frame_stride"))]
    dataset = [
        "dataset=ucf101",
        "dataset.root=ucf",
        "dataset.num_classes=2",
        "base.num_frames=8",
        "base.frame_stride=8",
    ]
    main([*run, *dataset, f"decoder={decoder}", "output_dir=out", "model.width=4"])
    assert not Path("out/bad_videos.csv").exists()
    assert "held-out videos" in Path("out/report.md").read_text()


def test_too_many_bad_videos_end_the_run_with_one_line(
    paths: dict[str, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_line(main, [*RUN, f"dataset.root={paths['root']['']}", "decoder=pyav", "output_dir=out"], capsys)
    assert "clips could not be read, more than dataset.max_bad_fraction=0.05: see out/bad_videos.csv" in line
    assert len(read_reported(tmp_path / "out", paths["root"][""], "train")) > 3
