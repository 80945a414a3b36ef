"""Test the published datasets with annotations in their official formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from videos import numbered_frame, read_number, write_video

from mgvideo.datasets.charades import charades
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.ssv2 import ssv2
from mgvideo.datasets.ucf_hmdb import hmdb51, ucf101
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

GRID = Grid(frames=4, size=60, strides=(2, 2), scales=(60, 60))


def paths(dataset: Any, root: Path) -> list[str]:
    return [Path(dataset.path(i)).relative_to(root).as_posix() for i in range(len(dataset))]


def files(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        (root / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (root / name.replace("__", "/")).write_text(text)


KINETICS = """label,youtube_id,time_start,time_end,split
playing harp,aaa-bbb_ccc,10,20,train
"shooting, basketball",ddd,0,10,train
playing harp,gone,5,15,train
abseiling,eee,7,17,train
"""


def test_kinetics_finds_the_clips_of_an_official_csv(tmp_path: Path) -> None:
    write_video(tmp_path / "train/playing harp/aaa-bbb_ccc_000010_000020.mp4", frames=8)
    write_video(tmp_path / "train/ddd.mkv", frames=8)
    write_video(tmp_path / "train/eee_000007_000017.mp4", frames=8)
    (tmp_path / "train.csv").write_text(KINETICS)
    dataset = kinetics(str(tmp_path), "train.csv", num_classes=3)
    assert dataset.class_names == ["abseiling", "playing harp", "shooting, basketball"]
    assert paths(dataset, tmp_path) == [
        "train/playing harp/aaa-bbb_ccc_000010_000020.mp4",
        "train/ddd.mkv",
        "train/eee_000007_000017.mp4",
    ]
    assert dataset.labels.tolist() == [1, 2, 0]
    assert [(entry.path, entry.label) for entry in dataset.missing] == [("gone_000005_000015.mp4", 1)]
    assert dataset.notes == [f"train.csv: 1 of 4 clips are not under {tmp_path} and left out"]
    assert dataset[ClipRequest(1, GRID, 0)].clip.shape == (4, 60, 60, 3)


def test_kinetics_selects_a_split_of_a_combined_csv(tmp_path: Path) -> None:
    rows = ["label,youtube_id,time_start,time_end,split"]
    for i, split in enumerate(("train", "validate", "val", "test", "")):
        write_video(tmp_path / f"v{i}.mp4", frames=2)
        rows.append(f"class {i},v{i},0,10,{split}")
    (tmp_path / "all.csv").write_text("\n".join(rows))

    def of(split: str | None) -> Any:
        return kinetics(str(tmp_path), "all.csv", num_classes=5, split=split)

    assert [paths(of(split), tmp_path) for split in ("train", "val", "validate", "test")] == [
        ["v0.mp4", "v4.mp4"],
        ["v1.mp4", "v2.mp4", "v4.mp4"],
        ["v1.mp4", "v2.mp4", "v4.mp4"],
        ["v3.mp4", "v4.mp4"],
    ]
    assert len(of(None)) == 5
    assert of("val").labels.tolist() == [1, 2, 4], "numbered alike in each"
    (tmp_path / "all.csv").write_text("\n".join(rows[:3]))
    with pytest.raises(UserError, match=r"all\.csv: no clips of split=test, only of train, val; choose one of them"):
        kinetics(str(tmp_path), "all.csv", num_classes=2, split="test")


def test_kinetics_skips_leftovers_and_notes_skipped_files(tmp_path: Path) -> None:
    write_video(tmp_path / "harp/aaa-bbb_ccc_000010_000020.mp4", frames=8)
    (tmp_path / "harp/ddd_000000_000010.MTS").touch()
    for name in ("._eee_000007_000017.mp4", "@eaDir/eee_000007_000017.mp4", "eee_000007_000017.mp4.part"):
        (tmp_path / "harp" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "harp" / name).touch()
    (tmp_path / "train.csv").write_text(KINETICS)
    dataset = kinetics(str(tmp_path), "train.csv", num_classes=3)
    assert paths(dataset, tmp_path) == ["harp/aaa-bbb_ccc_000010_000020.mp4", "harp/ddd_000000_000010.MTS"]
    assert dataset.notes == [
        f"train.csv: 2 of 4 clips are not under {tmp_path} and left out",
        f"{tmp_path}: skipped files without a video extension: 1 .part",
        f"{tmp_path}: skipped files of other programs: ._*, @eaDir",
    ]


def test_kinetics_merges_spellings_of_a_class(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    text = "\ufefflabel;youtube_id;time_start;time_end\r\n\r\ncafe\u0301\u00a0bar ;a;0;10\r\ncaf\u00e9 bar;a;0;10\r\n"
    (tmp_path / "train.csv").write_bytes(text.encode("utf-16"))
    dataset = kinetics(str(tmp_path), "train.csv", num_classes=1)
    assert (dataset.class_names, dataset.labels.tolist()) == (["caf\u00e9 bar"], [0, 0])
    assert "read as one class" in dataset.notes[0]
    assert "train.csv: listed more than once: a.mp4;" in dataset.notes[1]
    (tmp_path / "classes.txt").write_text("Caf\u00e9 bar\n")
    with pytest.raises(
        UserError, match=r"train\.csv:3: class 'café bar' is not in classes\.txt; 'Café bar' looks like it"
    ):
        kinetics(str(tmp_path), "train.csv", num_classes=1)
    (tmp_path / "classes.txt").write_text("tap\nTap\n")
    with pytest.raises(UserError, match=r"classes\.txt: classes 0 and 1, 'tap' and 'Tap', look alike"):
        kinetics(str(tmp_path), "train.csv", num_classes=2)


def test_kinetics_reads_a_list_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("train/a.mp4 1\nb.mp4 0\n")
    dataset = kinetics(str(tmp_path), "train.csv", num_classes=2)
    assert (paths(dataset, tmp_path), dataset.labels.tolist()) == (["train/a.mp4", "b.mp4"], [1, 0])


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        (KINETICS, 400, r"train\.csv: 3 classes, not 400"),
        (KINETICS, 3, r"none of its 4 clips is under .*expected, for example, aaa-bbb_ccc_000010_000020\.mp4"),
        (KINETICS + ",fff,1,2,train\n", 3, r"train\.csv:6: expected label,youtube_id"),
        (KINETICS + "abseiling,fff,soon,2,train\n", 3, r"train\.csv:6: expected label,youtube_id"),
        (KINETICS + "abseiling,fff,1,,train\n", 3, r"train\.csv:6: expected label,youtube_id"),
        (KINETICS + "abseiling,fff,1,1.2.3,train\n", 3, r"train\.csv:6: expected label,youtube_id"),
        (KINETICS + "\n\nabseiling,fff,1,nan,train\n", 3, r"train\.csv:8: expected label,youtube_id"),
        (KINETICS + '"abseiling,fff,1,2,train\neating,ggg,1,2,train\n', 3, r"train\.csv:6: quotes are not closed"),
        (KINETICS + "shooting, basketball,fff,1,2,train\n", 3, r"train\.csv:6: 6 fields where the header has 5"),
        (KINETICS + "Abseiling,fff,1,2,train\n", 4, r"train\.csv:6: class 'Abseiling' looks like 'abseiling' of .*:5"),
    ],
)
def test_kinetics_refuses_bad_annotations(tmp_path: Path, text: str, classes: int, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        kinetics(str(tmp_path), "train.csv", num_classes=classes)


CHARADES = """id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
AAAAA,HR43,Kitchen,6,7,Yes,"He, she; they",food,"a; b",c092 0.50 1.00;c147 0.00 4.00;c092 3.00 3.50,4.00
BBBBB,HR43,Kitchen,6,7,Yes,text,,,,4.00
"""


FRAMES = "original_vido_id video_id frame_id path labels"


def test_charades_free_text_loses_no_row(tmp_path: Path) -> None:
    text = 'id,script,actions\nAAAAA,"He says ""hi"",\nand sits",c001 0 1\nBBBBB,"Hi" he says,c002 0 1;\n'
    (tmp_path / "train.csv").write_text(text)
    dataset = charades(str(tmp_path), "train.csv")
    assert [dataset.entry(i).label for i in range(len(dataset))] == [(1,), (2,)]
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 Doing a thing\n")
    with pytest.raises(UserError, match=r"Charades_v1_classes\.txt: 1 classes, not 157"):
        charades(str(tmp_path), "train.csv")


def test_charades_skips_files_of_macos(tmp_path: Path) -> None:
    (tmp_path / "frames/AAAAA").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(numbered_frame(i, 80, 80)).save(tmp_path / f"frames/AAAAA/{i}.png")
        (tmp_path / f"frames/AAAAA/._{i}.png").write_bytes(b"AppleDouble")
    (tmp_path / "train.csv").write_text(f'{FRAMES}\nAAAAA 0 0 AAAAA/0.png "3"\n')
    dataset = charades(str(tmp_path), "train.csv", videos="frames", flip=False)
    sample = dataset[ClipRequest(0, Grid(4, 60, (1, 1), (60, 60)), 0)]
    assert [read_number(frame) for frame in sample.clip] == [0, 1, 2, 3]


def hot(label: torch.Tensor) -> list[int]:
    assert label.dtype == torch.float32
    assert label.shape == (157,)
    return label.nonzero().flatten().tolist()


def test_charades_clip_has_the_labels_of_its_actions(tmp_path: Path) -> None:
    write_video(tmp_path / "Charades_v1_480/AAAAA.mp4", frames=100, fps=25, height=80)
    write_video(tmp_path / "Charades_v1_480/BBBBB.mp4", frames=100, fps=25, height=80)
    classes = "".join(f"c{i:03d} Doing thing {i}\n" for i in range(157))
    files(tmp_path, **{"train.csv": CHARADES, "Charades_v1_classes.txt": classes})
    dataset = charades(str(tmp_path), "train.csv", flip=False)
    assert dataset.class_names[92] == "Doing thing 92"
    assert dataset.sampling.inverse_jitter
    seen = set()
    for seed in range(40):
        sample = dataset[ClipRequest(0, GRID, seed)]
        first = read_number(sample.clip[0])
        last = first + 6
        shown = (first <= 25 and last >= 13) or (first <= 87 and last >= 75)
        assert hot(sample.label) == ([92, 147] if shown else [147])
        seen.add(tuple(hot(sample.label)))
    assert seen == {(147,), (92, 147)}
    assert hot(dataset[ClipRequest(0, GRID, 0, View(1, 3, 1))].label) == [92, 147], "all of the video's in testing"
    assert hot(dataset[ClipRequest(1, GRID, 0)].label) == []
    files(tmp_path, **{"train.csv": CHARADES.replace("3.50", "3.60")})
    assert charades(str(tmp_path), "train.csv").fingerprint() != dataset.fingerprint(), "times are part of the labels"


def test_charades_reads_frame_lists(tmp_path: Path) -> None:
    lines = [FRAMES]
    for i in range(24):
        path = tmp_path / f"frames/AAAAA/AAAAA-{i + 1:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered_frame(i, 80, 80)).save(path)
        lines.append(f'AAAAA 0 {i} AAAAA/{path.name} "{"3,5" if i < 6 else "5" if i == 20 else ""}"')
    (tmp_path / "train.csv").write_text("\n".join(lines))
    dataset = charades(str(tmp_path), "train.csv", videos="frames", flip=False)
    assert hot(dataset.label(0)) == [3, 5]
    for seed in range(20):
        sample = dataset[ClipRequest(0, GRID, seed)]
        numbers = [read_number(frame) for frame in sample.clip]
        assert numbers == list(range(numbers[0], numbers[0] + 7, 2))
        shown = [3, 5] if numbers[0] < 6 else [5] if numbers[0] <= 20 <= numbers[-1] else []
        assert hot(sample.label) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,length\n", r"train\.csv:1: expected the header of Charades_v1_train\.csv or of a frame list"),
        ("id,actions\nAAAAA,c200 0 1\n", r"train\.csv:2: expected actions as .* found 'c200 0 1'"),
        ("id,actions\nAAAAA,c001 0\n", r"train\.csv:2: expected actions as"),
        ("id,actions\n", r"train\.csv: no videos in the list"),
        ('original_vido_id video_id frame_id path labels\nA 0 x p "1"\n', r"train\.csv:2: expected 'id video frame"),
        (f'{FRAMES}\nA 0 0 p "1"\n\nA 0 1 p "2\nA 0 2 p "3"\n', r"train\.csv:4: expected 'id video frame"),
        (f'{FRAMES}\nA 0 1 p "2\n"\nA 0 2 p "3"\n', r"train\.csv:2: expected 'id video frame"),
        (
            "id,actions\nAAAAA,c001 0 1\n\nAAAAA,c002 0 1\n",
            r"train\.csv:4: expected the id of another video, found 'AAAAA'",
        ),
        ("actions,id\nc001 0 1\n", r"train\.csv:2: expected the id of another video, found ''"),
        ("id,actions\nAAAAA,c001 0 nan\n", r"train\.csv:2: expected actions as"),
        (
            'id,actions\nAAAAA,"c001 0 1\nBBBBB,c002 0 1"\n',
            r"train\.csv:2: quotes that are opened here are closed in line 3",
        ),
        ("id,actions\nAAAAA,c001 0 1,c002 0 1\n", r"train\.csv:2: 3 fields where the header has 2"),
    ],
)
def test_charades_refuses_bad_annotations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        charades(str(tmp_path), "train.csv")


def something(root: Path, items: list[Any], labels: dict[str, str]) -> None:
    (root / "train.json").write_text(json.dumps(items))
    (root / "labels.json").write_text(json.dumps(labels))


LABELS = {"Pushing something from left to right": "1", "Holding something next to something": "0"}
ITEM = {
    "id": "78687",
    "label": "pushing a cup from left to right",
    "template": "Pushing [something] from left to right",
}


def test_ssv2_samples_segments_and_never_flips(tmp_path: Path) -> None:
    write_video(
        tmp_path / "webm/78687.webm", frames=41, height=80, codec="libvpx-vp9", options={"deadline": "realtime"}
    )
    something(tmp_path, [ITEM], LABELS)
    dataset = ssv2(str(tmp_path), "train.json", labels="labels.json", videos="webm")
    assert dataset.class_names == ["Holding something next to something", "Pushing something from left to right"]
    assert dataset.labels.tolist() == [1]
    for seed in range(10):
        numbers = [read_number(frame) for frame in dataset[ClipRequest(0, GRID, seed)].clip]
        assert all(10 * i <= number <= 10 * (i + 1) for i, number in enumerate(numbers)), numbers
    views = dataset[ClipRequest(0, GRID, 0, View(0, 1, 3))].clip
    assert [read_number(frame) for frame in views[1]] == [5, 15, 25, 35]


@pytest.mark.parametrize(
    ("items", "labels", "message"),
    [
        ([{"id": "1"}], LABELS, r"train\.json:1: item 1: expected an id and a template"),
        ([{**ITEM, "template": "Eating [something]"}], LABELS, r"'Eating something' is not a label of labels\.json"),
        ([ITEM], {"Pushing something from left to right": "3"}, r"labels must be numbered from 0 to 0"),
        ([ITEM], {"Pushing something from left to right": "zero"}, r"labels must be numbered from 0 to 0"),
        ([{"id": "1", "template": 5}], LABELS, r"train\.json:1: item 1: expected an id and a template"),
        ([], LABELS, r"train\.json: no videos in the list"),
        ({}, LABELS, r"train\.json:1: expected an id and a template"),
    ],
)
def test_ssv2_refuses_bad_annotations(tmp_path: Path, items: Any, labels: dict, message: str) -> None:
    something(tmp_path, items, labels)
    with pytest.raises(UserError, match=message):
        ssv2(str(tmp_path), "train.json", labels="labels.json")


def test_ssv2_normalises_labels(tmp_path: Path) -> None:
    something(tmp_path, [{"id": 7, "template": "Holding\u00a0[cafe\u0301] "}], {"Holding caf\u00e9": "0"})
    dataset = ssv2(str(tmp_path), "train.json", labels="labels.json")
    assert (dataset.class_names, dataset.labels.tolist()) == (["Holding caf\u00e9"], [0])
    (tmp_path / "train.json").write_text('[\n{"id": "1", "template": "Holding [café]"},\n{"id": [2], "template": "x"}]')
    with pytest.raises(UserError, match=r"train\.json:3: item 2: expected an id and a template"):
        ssv2(str(tmp_path), "train.json", labels="labels.json")
    something(tmp_path, [{"id": 7, "template": "holding [café]"}], {"Holding caf\u00e9": "0"})
    with pytest.raises(UserError, match=r"'holding café' is not a label of labels\.json; 'Holding café' looks like it"):
        ssv2(str(tmp_path), "train.json", labels="labels.json")
    something(tmp_path, [], {"Holding a cup": "0", "holding a  cup": "1"})
    with pytest.raises(UserError, match=r"labels\.json: classes 0 and 1, .* look alike"):
        ssv2(str(tmp_path), "train.json", labels="labels.json")


UCF = "ucfTrainTestlist"


@pytest.mark.parametrize(
    ("index", "lines", "message"),
    [
        ("1 A\n2 B\n", "A/v 1.avi 1\nB/v.avi,2\nB\\w.avi\n\n", None),
        ("2 B\n1 A\n", "A/v 1.avi 1\nB/v.avi 2\nB/w.avi\n", None),
        ("1 A\n2 B\n", "A/v.avi 1\nB/v.avi 1\n", r"trainlist01\.txt:2: label 1, where classInd\.txt has 2 for B"),
        ("1 A\n2 B\n", "A/v.avi 1 2\n", r"trainlist01\.txt:1: expected 'CLASS/video\.avi 1'"),
        ("1 A\n2 B\n", "a/v.avi 1\n", r"trainlist01\.txt:1: class 'a' is not in classInd\.txt; 'A' looks like it"),
        ("1 A\n1 B\n", "A/v.avi 1\n", r"classInd\.txt:2: expected a new number and a class, found '1 B'"),
        ("1 A\n3 B\n", "A/v.avi 1\n", r"classInd\.txt: classes must be numbered from 1 to 2"),
        ("A\nB\n", "A/v.avi 1\n", r"classInd\.txt:1: expected a new number and a class, found 'A'"),
        ("1 A\n2 a\n", "A/v.avi 1\n", r"classInd\.txt: classes 0 and 1, 'A' and 'a', look alike"),
    ],
)
def test_ucf101_reads_variants_of_lines_or_names_the_line(
    tmp_path: Path, index: str, lines: str, message: str | None
) -> None:
    files(tmp_path, **{f"{UCF}__classInd.txt": index, f"{UCF}__trainlist01.txt": lines})
    if message is None:
        dataset = ucf101(str(tmp_path), "train")
        assert dataset.class_names == ["A", "B"]
        assert paths(dataset, tmp_path) == ["UCF-101/A/v 1.avi", "UCF-101/B/v.avi", "UCF-101/B/w.avi"]
        assert dataset.labels.tolist() == [0, 1, 1]
        return
    with pytest.raises(UserError, match=message):
        ucf101(str(tmp_path), "train")


def test_ucf101_follows_its_official_splits(tmp_path: Path) -> None:
    write_video(tmp_path / "UCF-101/Archery/v_Archery_g08_c01.avi", codec="mpeg4", frames=8)
    files(
        tmp_path,
        **{
            "ucfTrainTestlist__classInd.txt": "1 ApplyEyeMakeup\r\n2 Archery\r\n",
            "ucfTrainTestlist__trainlist02.txt": "Archery/v_Archery_g08_c01.avi 2\r\n",
            "ucfTrainTestlist__testlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n",
        },
    )
    train, val = (ucf101(str(tmp_path), split, fold=2) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["ApplyEyeMakeup", "Archery"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([1], [0])
    assert train[ClipRequest(0, GRID, 0)].clip.shape == (4, 60, 60, 3)
    with pytest.raises(UserError, match=r"trainlist03\.txt: cannot be read: No such file"):
        ucf101(str(tmp_path), "train", fold=3)
    (tmp_path / "ucfTrainTestlist/trainlist02.txt").write_text("Sitting/v.avi 2\n")
    with pytest.raises(UserError, match=r"trainlist02\.txt:1: class 'Sitting' is not in classInd\.txt"):
        ucf101(str(tmp_path), "train", fold=2)


def test_hmdb51_follows_its_official_splits(tmp_path: Path) -> None:
    write_video(tmp_path / "hmdb51_org/wave/a_1.avi", codec="mpeg4", frames=8)
    splits = "testTrainMulti_7030_splits"
    files(
        tmp_path,
        **{
            f"{splits}__brush_hair_test_split1.txt": "b.avi 2 \nc.avi 0 \n",
            f"{splits}__wave_test_split1.txt": "a_1.avi 1 \n",
        },
    )
    train, val = (hmdb51(str(tmp_path), split) for split in ("train", "val"))
    assert train.class_names == ["brush_hair", "wave"]
    assert (paths(train, tmp_path), train.labels.tolist()) == (["hmdb51_org/wave/a_1.avi"], [1])
    assert (paths(val, tmp_path), val.labels.tolist()) == (["hmdb51_org/brush_hair/b.avi"], [0])
    assert train[ClipRequest(0, GRID, 0)].clip.shape == (4, 60, 60, 3)
    (tmp_path / splits / "._wave_test_split1.txt").write_bytes(b"\0\5\x16\7AppleDouble")
    assert hmdb51(str(tmp_path), "train").class_names == ["brush_hair", "wave"], "macOS left a file"
    with pytest.raises(UserError, match=r"no files \*_test_split2\.txt"):
        hmdb51(str(tmp_path), "train", fold=2)
    (tmp_path / splits / "wave_test_split1.txt").write_text("a.avi 7\n")
    with pytest.raises(UserError, match=r"wave_test_split1\.txt:1: expected 'name\.avi 0\|1\|2'"):
        hmdb51(str(tmp_path), "train")
