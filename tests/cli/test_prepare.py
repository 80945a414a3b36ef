"""`mgvideo prepare` on small real files, one of them broken."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import error_line
from training import KNOBS, ROOT, TINY, metrics, run_program
from videos import numbered_frame, write_rotated, write_video

from mgvideo.cli import app
from mgvideo.cli.build import build_data, build_decoder
from mgvideo.cli.prepare import COMMANDS, _motion_overrides, main, read_keys
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.motion import make_motion
from mgvideo.datasets.packed_pyramid import PackedPyramid
from mgvideo.datasets.packet_index import PacketIndex
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid

KINETICS = ["dataset=kinetics400", "dataset.num_classes=8"]
GRID = Grid(4, 32, (1, 3), (36, 84))


def prepare(name: str, own_overrides: list[str], overrides: list[str]) -> None:
    command = COMMANDS[name]
    command.task(read_keys(command.keys, own_overrides), app.compose_config("run", overrides))


@pytest.fixture
def broken(tmp_path: Path, motion_root: str) -> Path:
    """A folder that lists eight videos, of which one is broken and one is missing."""
    root = tmp_path / "videos"
    source = make_motion(motion_root, KNOBS)
    (root / "train").mkdir(parents=True)
    lines = (source / "train.csv").read_text().splitlines()[:8]
    for line in lines[:-1]:
        (root / line.split()[0]).write_bytes((source / line.split()[0]).read_bytes())
    (root / lines[0].split()[0]).write_bytes(b"not a video")
    (root / "train.csv").write_text("\n".join(lines))
    return root


def test_check_reports_files_and_classes_and_exits_with_1_above_the_threshold(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.csv"
    own_overrides = [f"out={out}", "split=train", "min_frames=20", "processes=1"]
    overrides = [*KINETICS, f"dataset.root={broken}"]
    with pytest.raises(SystemExit) as stop:
        prepare("check", own_overrides, overrides)
    assert stop.value.code == 1
    rows = list(csv.DictReader(out.open()))
    assert [(Path(row["path"]).name, row["problem"]) for row in rows] == [
        ("00000.mp4", "unreadable"),
        ("00007.mp4", "missing"),
    ]
    classes = list(csv.DictReader((tmp_path / "found_classes.csv").open()))
    assert [(row["class"], row["videos"], row["count"]) for row in classes] == [("0", "1", "1"), ("7", "1", "1")]
    assert "25.00% are missing or unreadable" in capsys.readouterr().out
    assert not Path(f"{out}.part").exists()
    prepare("check", [*own_overrides, "max_broken=0.25"], overrides)


def test_check_reports_repeated_lines(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "train.csv").write_text("train/00001.mp4 1\ntrain/00001.mp4 2\ntrain/00002.mp4 2\n")
    (broken / "val.csv").write_text("train/00001.mp4 1\n")
    out = tmp_path / "found.csv"
    prepare("check", [f"out={out}", "min_frames=1", "processes=1"], [*KINETICS, f"dataset.root={broken}"])
    assert [(Path(row["path"]).name, row["problem"], row["reason"]) for row in csv.DictReader(out.open())] == [
        ("00001.mp4", "duplicate", "listed 2 times in train"),
        ("00001.mp4", "conflicting labels", "1 or 2"),
        ("00001.mp4", "overlap", "listed in train and val"),
    ]
    assert "2 videos, 1 of them with a problem" in capsys.readouterr().out


def test_check_counts_missing_videos_of_official_annotations(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["label,youtube_id,time_start,time_end,split", "run,00001,0,10,train", "walk,gone,5,15,train"]
    rows += ["walk,00002,0,10,validate", "run,unheard,5,15,test"]
    (broken / "all.csv").write_text("\n".join(rows))
    out = tmp_path / "found.csv"
    files = [f"dataset.{part}.list_file=all.csv" for part in ("train", "val")]
    overrides = ["dataset=kinetics400", "dataset.num_classes=2", f"dataset.root={broken}", *files]
    with pytest.raises(SystemExit):
        prepare("check", [f"out={out}", "min_frames=1", "processes=1", "max_broken=0.3"], overrides)
    (row,) = csv.DictReader(out.open())
    assert (Path(row["path"]).name, row["problem"]) == ("gone_000005_000015.mp4", "missing")
    classes = list(csv.DictReader((tmp_path / "found_classes.csv").open()))
    assert [(row["class"], row["videos"], row["problem"]) for row in classes] == [("walk", "2", "missing")]
    assert "33.33% are missing or unreadable" in capsys.readouterr().out


def test_short_videos_are_a_note_unless_min_frames_is_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{name}.mp4 {label}" for label, name in enumerate("ab")]
    for name, frames in (("a", 20), ("b", 40)):
        write_video(tmp_path / f"{name}.mp4", frames)
    (tmp_path / "train.csv").write_text("\n".join(lines))
    overrides = ["dataset=kinetics400", "dataset.num_classes=2", f"dataset.root={tmp_path}", "base.num_frames=16"]
    out = tmp_path / "found.csv"
    prepare("check", [f"out={out}", "split=train", "processes=1"], overrides)
    assert not list(csv.DictReader(out.open()))
    output = capsys.readouterr().out
    assert "2 videos, 0 of them with a problem" in output
    assert "note: 1 of 2 videos have fewer frames than the 31 that a clip of base.num_frames=16" in output
    assert "clips repeat their last frame; min_frames=31 lists them" in output
    prepare("check", [f"out={out}", "split=train", "processes=1", "min_frames=31"], overrides)
    assert [row["problem"] for row in csv.DictReader(out.open())] == ["too short"]


def test_with_segment_sampling_one_frame_is_long_enough(tmp_path: Path) -> None:
    write_video(
        tmp_path / "20bn-something-something-v2/1.webm", 3, codec="libvpx-vp9", options={"deadline": "realtime"}
    )
    (tmp_path / "something-something-v2-labels.json").write_text('{"Holding something": "0"}')
    item = {"id": "1", "label": "holding a cup", "template": "Holding [something]"}
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps([item]))
    out = tmp_path / "found.csv"
    prepare("check", [f"out={out}", "split=train", "processes=1"], ["dataset=ssv2", f"dataset.root={tmp_path}"])
    assert not list(csv.DictReader(out.open()))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Overrides for a dataset of two image folders with two labels each; one folder has too few frames."""
    lines = ["original_vido_id video_id frame_id path labels"]
    for name, frames in (("AAAAA", 4), ("BBBBB", 2)):
        for i in range(frames):
            path = tmp_path / f"frames/{name}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbered_frame(i, 60, 80)).save(path)
            lines.append(f'{name} 0 {i} {name}/{path.name} "3,5"')
    (tmp_path / "frames.csv").write_text("\n".join(lines))
    (tmp_path / "videos.csv").write_text("id,actions\nCCCCC,c001 0 1\n")
    annotations = [
        "dataset.train.annotations=frames.csv",
        "dataset.train.videos=frames",
        "dataset.val.annotations=videos.csv",
    ]
    return ["dataset=charades", f"dataset.root={tmp_path}", *annotations]


def test_image_folders_are_checked_and_each_label_is_counted(images: list[str], tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    own_overrides = [f"out={out}", "min_frames=3", "processes=1"]
    prepare("check", [*own_overrides, "split=train"], images)
    assert [(Path(row["path"]).name, row["problem"]) for row in csv.DictReader(out.open())] == [("BBBBB", "too short")]
    classes = list(csv.DictReader((tmp_path / "found_classes.csv").open()))
    assert [(row["class"], row["videos"], row["count"]) for row in classes] == [("c003", "2", "1"), ("c005", "2", "1")]
    with pytest.raises(UserError, match="check each by itself, with split=train and split=val"):
        prepare("check", own_overrides, images)
    with pytest.raises(UserError, match="dataset charades: frames are images, no video to encode"):
        prepare("pyramid", [f"out={tmp_path / 'pyramid'}", "split=train"], images)


def test_a_pyramid_includes_rotated_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "upright.mp4")
    write_rotated(tmp_path / "turned.mp4")
    (tmp_path / "train.csv").write_text("upright.mp4 0\nturned.mp4 1\nturned.mp4 1\n")
    own_overrides = [f"out={tmp_path / 'pyramid'}", "split=train", "processes=1"]
    prepare("pyramid", own_overrides, [*KINETICS, f"dataset.root={tmp_path}"])
    output = capsys.readouterr().out
    assert "2 videos: " in output
    assert "read from the original" not in output


def test_a_list_of_absolute_paths_outside_the_root_trains_and_has_a_pyramid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, root, pyramid = tmp_path / "videos", tmp_path / "lists", tmp_path / "pyramid"
    lines = []
    for number in range(16):
        write_video(videos / f"{number}.mp4")
        lines.append(f"{videos / f'{number}.mp4'} {number % 2}\n")
    root.mkdir()
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("".join(lines[: 16 if split == "train" else 2]))
    overrides = [
        "dataset=kinetics400", "dataset.num_classes=2", f"dataset.root={root}", "model=r2plus1d_small", "model.width=4",
        "base.num_frames=8", "base.crop_size=32", "base.short_side=[36,40]", "base.batch_size=8", "base.epochs=1",
        "base.lr_milestones=[]", "base.warmup_epochs=0", "schedule=baseline", "train.precise_bn_clips=0",
    ]  # fmt: skip
    prepare("pyramid", [f"out={pyramid}", "processes=1"], overrides)
    assert "16 videos: " in capsys.readouterr().out
    assert len(list(pyramid.rglob(f".outside{videos}/*.mp4"))) == 16
    shutil.rmtree(videos)  # so that only the levels can be read
    more = [f"dataset.pyramid={pyramid}", "loader.num_workers=0", "test.enable=false", "train.evals_per_phase=0"]
    result = run_program(*overrides, *more, "output_dir=out", "dataset.max_bad_fraction=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_killed_check_resumes(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    own_overrides = [f"out={out}", "split=train", "min_frames=20", "processes=1", "max_broken=1"]
    settings = {"min_frames": 20, "fully": True}
    path = str(broken / "train/00001.mp4")
    finding = {"path": path, "problem": "rotated", "reason": "found before"}
    journal = f'{json.dumps(settings)}\n{json.dumps({"path": path, "findings": [finding]})}\n{{"path": "unfini'
    Path(f"{out}.part").write_text(journal)
    prepare("check", own_overrides, [*KINETICS, f"dataset.root={broken}"])
    reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(out.open())}
    assert reasons.keys() == {"00000.mp4", "00001.mp4", "00007.mp4"}
    assert reasons["00001.mp4"] == "found before"
    Path(f"{out}.part").write_text(journal.replace("20", "1"))
    prepare("check", own_overrides, [*KINETICS, f"dataset.root={broken}"])
    assert "found before" not in out.read_text(), "a check with other settings starts from scratch"


def test_a_run_trains_on_a_pyramid_that_was_killed_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, pyramid = tmp_path / "motion", tmp_path / "pyramid"
    make_motion(str(root), replace(KNOBS, train=16, val=2), 1)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4")}
    own_overrides = [f"out={pyramid}", "processes=1"]
    overrides = [*TINY, "dataset.knobs.train=16", "dataset.knobs.val=2", f"dataset.root={root}", "schedule=short"]
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "pyramid", *own_overrides, *overrides]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        manifest = pyramid / "rows.jsonl"
        while not (manifest.exists() and manifest.read_text()):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    prepare("pyramid", own_overrides, overrides)
    captured = capsys.readouterr()
    assert "levels with short sides of 20, 30, 40 pixels for 18 videos" in captured.out
    assert "18 videos: " in captured.out
    assert ", 0 s left" in captured.err
    assert len(list(pyramid.rglob("*.mp4"))) == 3 * 18
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4")}
    result = run_program(
        *overrides, f"dataset.pyramid={pyramid}", "output_dir=out", "test.enable=false", "train.evals_per_phase=0",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "out")
    assert not list((tmp_path / "out").glob("bad_videos.csv"))


def test_a_missing_pyramid_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.pyramid: no pyramid in"):
        build_decoder(app.compose_config("run", [f"dataset.pyramid={tmp_path}"]))


def test_a_packed_dataset_with_its_pyramid_loads_the_same_clips(
    tmp_path: Path, motion_root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, pyramid, out = make_motion(motion_root, KNOBS), tmp_path / "pyramid", tmp_path / "packed"
    clips = ["base.num_frames=4", "base.crop_size=64", "base.short_side=[72,84]"]
    clips += ["sampling.protocol=regular", "sampling.target_fps=null", "sampling.antialias=true"]
    overrides = [*KINETICS, f"dataset.root={source}", "dataset.train.flip=false", "dataset.val.flip=false", *clips]
    prepare("pyramid", [f"out={pyramid}", "processes=1"], overrides)
    prepare("pack", [f"out={out}", "processes=2"], [*overrides, f"dataset.pyramid={pyramid}"])
    assert f"train with dataset=shards dataset.root={out} dataset.pyramid={out}" in capsys.readouterr().out
    packed = ["dataset=shards", f"dataset.root={out}", f"dataset.pyramid={out}", "recipe=motion", *clips]
    loose, tarred = (
        build_data(app.compose_config("run", [*words, "decoder=pyav"]))
        for words in ([*overrides, f"dataset.pyramid={pyramid}"], packed)
    )
    assert loose.classes == tarred.classes
    assert isinstance(tarred.train.decoder, PackedPyramid)
    assert not tarred.train.sampling.flip
    for expected, dataset in ((loose.train, tarred.train), (loose.val, tarred.val)):
        assert len(dataset) == len(expected)
        for index in range(0, len(expected), 5):
            sample, other = (part[ClipRequest(index, GRID, index)] for part in (dataset, expected))
            assert torch.equal(sample.clip, other.clip)
            assert sample.label == other.label


def test_a_pack_leaves_out_bad_videos_and_exits_with_1_above_the_threshold(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prepare("pack", [f"out={tmp_path / 'packed'}", "split=train"], [*KINETICS, f"dataset.root={broken}"])
    output = capsys.readouterr()
    assert "7 videos in 1 archives" in output.out
    assert "1 videos are left out, for example " in output.out
    assert "error: that is more than dataset.max_bad_fraction=0.05" in output.err


def test_list_of_official_annotations_leaves_out_missing_videos(broken: Path, tmp_path: Path) -> None:
    rows = ["label,youtube_id,time_start,time_end,split"]
    for i, name in enumerate(("tap dancing", "air drumming", "gone")):
        rows.append(f"{name},video_{i},5,15,train")
        if name != "gone":
            (broken / "train" / f"0000{i + 1}.mp4").rename(broken / "train" / f"video_{i}_000005_000015.mp4")
    (broken / "official.csv").write_text("\n".join(rows))
    overrides = ["dataset=kinetics400", "dataset.num_classes=3", f"dataset.root={broken}"]
    out = tmp_path / "lists"
    prepare("list", [f"out={out}", "split=train"], [*overrides, "dataset.train.list_file=official.csv"])
    assert (out / "classes.txt").read_text().splitlines() == ["air drumming", "gone", "tap dancing"]
    listed = kinetics(str(broken), str(out / "train.csv"), 3, str(out / "classes.txt"))
    assert [(Path(listed.path(i)).name, listed.labels[i]) for i in range(len(listed))] == [
        ("video_0_000005_000015.mp4", 2),
        ("video_1_000005_000015.mp4", 0),
    ]
    with pytest.raises(UserError, match="is the annotation file of the dataset"):
        prepare("list", [f"out={broken}", "split=train"], [*KINETICS, f"dataset.root={broken}"])


def test_lists_with_unusual_file_names_are_read_back(tmp_path: Path) -> None:
    names = ["a b.mp4", "clip 120", "#a.mp4", '"q".mp4', "x.mp4 3", "c, d.mp4"]
    for name in names:
        (tmp_path / name).touch()
    quoted = [f'"{name.replace(chr(34), 2 * chr(34))}" {label}' for label, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("\n".join(quoted))
    prepare("list", [f"out={tmp_path / 'lists'}", "split=train"], [*KINETICS, f"dataset.root={tmp_path}"])
    listed = kinetics(str(tmp_path), "lists/train.csv", 8)
    assert [listed.entry(i).path for i in range(len(listed))] == names
    assert listed.labels.tolist() == list(range(6))


def test_a_file_name_that_is_not_utf_8_raises(tmp_path: Path) -> None:
    for name in ("caf\udce9/a.mp4", "caf\udce9/b.mp4", "run/c.mp4", "run/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"caf\\udce9/.\.mp4': the name is not UTF-8"):
        prepare("list", [f"out={tmp_path / 'lists'}"], ["dataset=folder", f"dataset.root={tmp_path}"])


def test_motion_like_kinetics(tmp_path: Path) -> None:
    options = read_keys(COMMANDS["motion"].keys, ["like=kinetics", "processes=1"])
    words = _motion_overrides(options, ["train=1", "val=1", "frames=3", f"dataset.root={tmp_path}"])
    cfg = app.compose_config("run", words)
    assert (cfg.dataset.knobs.width, cfg.dataset.knobs.keyframe, cfg.dataset.knobs.frames) == (340, 250, 3)
    COMMANDS["motion"].task(options, cfg)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress"], "there is no 'prepare compress'"),
        (["pyramid"], "out is not set"),
        (["pack"], "out is not set"),
        (["pack", "shard_mib=0"], "shard_mib=0"),
        (["check", "split=test"], "split=test"),
        (["check", "max_broken=2"], "max_broken=2"),
        (["check", "processes=0"], "processes=0"),
        (["motion", "like=ucf101"], "like=ucf101"),
    ],
)
def test_invalid_arguments_give_one_error_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_line(main, arguments, capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_lists_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {key}" in text for key in COMMANDS[name].keys.__annotations__)


def test_clips_are_drawn_as_read_and_as_augmented_with_their_labels(
    motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, overrides = tmp_path / "clips.png", [*TINY, f"dataset.root={motion_root}", "output_dir=none"]
    own_overrides = [f"out={out}", "step=1", "clips=3", "frames=2"]
    prepare("clips", own_overrides, overrides)
    picture = np.asarray(Image.open(out))
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    gap = (picture == 255).all((0, 2)).sum()
    width = (picture.shape[1] - gap) // 2
    assert np.array_equal(left[:, :width], right[:, -width:]), "without augmentation both sides are the same"
    assert "row 3: " in capsys.readouterr().out
    prepare("clips", own_overrides, [*overrides, "augment=strong"])
    strong = np.asarray(Image.open(out))
    assert strong.shape == picture.shape
    assert not np.array_equal(strong[:, :width], strong[:, -width:])
    assert "% " in capsys.readouterr().out, "mixed labels have shares"
    with pytest.raises(UserError, match="step=100000: the plan has"):
        prepare("clips", ["step=100000"], overrides)


def test_files_and_levels_are_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` and `pyramid` make indexes too; a run makes what is missing."""
    root, levels = tmp_path / "videos", tmp_path / "levels"
    for name in "abc":
        write_video(root / f"{name}.mp4", 12, 70, 90)
    (root / "b.mp4").write_bytes(b"not a video")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    overrides = ["dataset=kinetics400", "dataset.num_classes=3", f"dataset.root={root}", "base.crop_size=64"]
    overrides += ["base.short_side=[64,72]", "dataset.max_bad_fraction=0.5"]
    prepare("index", ["processes=1"], overrides)
    output = capsys.readouterr().out
    assert f"{root}/.mgvideo/packets.index: 2 videos, " in output
    assert f"1 of 3 files cannot be read: {root}/b.mp4: Invalid data found" in output
    content = (root / ".mgvideo/packets.index").read_bytes()
    prepare("index", ["processes=1"], overrides)
    assert (root / ".mgvideo/packets.index").read_bytes() == content, "nothing is new"
    (root / ".mgvideo/packets.index").unlink()
    prepare("check", ["processes=1", f"out={tmp_path / 'found.csv'}"], overrides)
    assert len(PacketIndex(str(root / ".mgvideo/packets.index"))) == 2
    prepare("pyramid", [f"out={levels}", "processes=1"], overrides)
    assert len(PacketIndex(str(levels / ".mgvideo/packets.index"))) == 2 * len(list(levels.glob("short*")))
    capsys.readouterr()
    (levels / ".mgvideo/packets.index").unlink()
    prepare("index", ["processes=1"], [*overrides, f"dataset.pyramid={levels}"])
    assert len(PacketIndex(str(levels / ".mgvideo/packets.index"))) == 2 * len(list(levels.glob("short*")))
    decoder = build_decoder(app.compose_config("run", [*overrides, f"dataset.pyramid={levels}"]))
    with decoder.open(str(root / "a.mp4"), 64) as video:
        assert (Path(video.path).parent.parent, video.container) == (levels, None)
    prepare("check", ["processes=1", f"out={tmp_path / 'found.csv'}"], [*overrides, "dataset.index=null"])
    with pytest.raises(UserError, match=r"dataset\.index=null: give auto, or a file"):
        prepare("index", [], [*overrides, "dataset.index=null"])


def test_index_can_be_any_file_for_all_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 12)
    overrides = ["dataset=kinetics400", f"dataset.root={tmp_path}", f"dataset.index={tmp_path}/elsewhere/index"]
    decoder = build_decoder(app.compose_config("run", overrides))
    for _ in range(2):
        decoder.open(str(tmp_path / "a.mp4")).close()
    assert len(PacketIndex(str(tmp_path / "elsewhere/index"))) == 1
    assert not (tmp_path / ".mgvideo/packets.index").exists()
    with pytest.raises(UserError, match=r"dataset\.index=s3://a/b: only output_dir may be a URL"):
        build_decoder(app.compose_config("run", ["dataset.index=s3://a/b"]))
