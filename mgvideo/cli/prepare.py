"""`mgvideo prepare`: check a dataset's files, build its pyramid, list it, or make the embedded one."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from mgvideo.datasets.check import (
    Finding,
    broken_share,
    check,
    count_problems,
    find_repeats,
    list_lines,
    write_findings,
)
from mgvideo.datasets.lists import list_line
from mgvideo.datasets.motion import Knobs, make_motion
from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.pyramid import ManifestRow, PyramidLayout, encode_pyramid
from mgvideo.datasets.video import VideoDataset
from mgvideo.datasets.videofile import DecodeError
from mgvideo.errors import UserError
from mgvideo.plan.plan import require
from mgvideo.storage.paths import exists, relative, writing

from . import app, keys
from .build import build_plan, require_dataset_keys
from .progress import ProgressLog
from .schema import key

KINETICS = ("width=340", "height=256", "frames=300", "fps=30", "keyframe=250", "train=64", "val=16")
SPLITS = {"train": ("train",), "val": ("val",), "both": ("train", "val")}
CLASSES_SHOWN = 10
SIDES_SAMPLED = 32  # files whose short side stands for the dataset's


@dataclass
class CheckKeys:
    """`check`."""

    split: str = key("both", "train, val or both")
    fully: bool = key(True, "decode every frame; false: the first, the middle and the last")
    min_frames: int | None = key(None, "fewer are too short; null: those that a clip of the base grid needs")
    max_broken: float | None = key(
        None, "exit with 1 over this share of missing and unreadable files; null: dataset.max_bad_fraction"
    )
    out: str = key("check.csv", "file for what is wrong, a line a problem; OUT_classes.csv counts it by class")
    processes: int | None = key(None, "files checked at a time; null: one a core")


@dataclass
class PyramidKeys:
    """`pyramid`."""

    out: str | None = key(None, "folder to build in, for dataset.pyramid; goes on where it was stopped")
    split: str = key("both", "train, val or both")
    processes: int | None = key(None, "files encoded at a time; null: one a core")


@dataclass
class ListKeys:
    """`list`."""

    out: str | None = key(None, "folder for train.csv, val.csv (path label) and classes.txt")
    split: str = key("both", "train, val or both")


@dataclass
class MotionKeys:
    """`motion`."""

    like: str = key("motion", "motion, or kinetics: " + " ".join(KINETICS))
    processes: int | None = key(None, "files made at a time; null: one a core")


class Command(NamedTuple):
    """A sub-command: its keys, what it does with them and a config, and what it is for."""

    keys: type
    task: Callable[[Any, DictConfig], None]
    text: str


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo prepare` and tools/prepare_data.py."""
    name, rest = (arguments or ["--help"])[0], list(arguments[1:])
    if name not in COMMANDS:
        print(_usage())
        if name not in ("-h", "--help"):
            print(f"error: there is no '{name}' to prepare; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
            raise SystemExit(2)
        return
    command = COMMANDS[name]
    own, rest = keys.split(command.keys, rest)
    given = command.keys()
    if not {"-h", "--help"} & set(rest):
        with app.exit_on_user_error():
            given = read_keys(command.keys, own)
    rest = _motion_overrides(given, rest) if isinstance(given, MotionKeys) else rest
    intro = f"{command.text[0].upper()}{command.text[1:]}. Takes the groups and keys of a run, and:"
    text = "\n".join([intro, "", *keys.describe(command.keys)])
    app.main("run", text, partial(command.task, given), rest, keys.names(command.keys))


def _usage() -> str:
    lines = ["Prepare a dataset. Originals are never touched, and a killed command goes on where it was.", ""]
    lines += [f"  mgvideo prepare {name:<8} {command.text}" for name, command in COMMANDS.items()]
    example = "mgvideo prepare pyramid dataset=kinetics400 dataset.root=/data/k400 out=/data/k400_pyramid"
    return "\n".join([*lines, "", f"For instance: {example}", "Each explains itself with --help."])


def read_keys(kind: type, overrides: Sequence[str]) -> Any:
    """A sub-command's own keys. Raises UserError where a value is of no use."""
    given: Any = keys.read(kind, overrides)
    split, processes = getattr(given, "split", "both"), getattr(given, "processes", None)
    require(split in SPLITS, f"split={split}: choose one of {', '.join(SPLITS)}")
    require(processes is None or processes >= 1, f"processes={processes}: give a whole number from 1 up")
    require(getattr(given, "out", "") is not None, "out is not set: add out=FOLDER to the command")
    if isinstance(given, MotionKeys):
        require(given.like in ("motion", "kinetics"), f"like={given.like}: choose motion or kinetics")
    if isinstance(given, CheckKeys):
        share, least = given.max_broken, given.min_frames
        require(share is None or 0 <= share <= 1, f"max_broken={share}: give a share from 0 to 1")
        require(least is None or least >= 1, f"min_frames={least}: give a whole number from 1 up")
    return given


def check_files(given: CheckKeys, cfg: DictConfig) -> None:
    """Decode a dataset's files, write what is wrong and sum it up; exits with 1 over the threshold."""
    datasets = dict(zip(SPLITS[given.split], _datasets(cfg, given.split), strict=True))
    first = next(iter(datasets.values()))
    require(
        all(type(dataset.decoder) is type(first.decoder) for dataset in datasets.values()),
        "one part of the dataset is videos, the other images: check each by itself, with split=train and split=val",
    )
    lines = [line for part, dataset in datasets.items() for line in list_lines(dataset, part)]
    classes: dict[str, set[str]] = {}
    for line in lines:
        classes.setdefault(line.path, set()).update(line.classes)
    # where a clip has a frame of each segment of its video, a short one gives the same frame for several
    span = 1 if first.sampling.segments else (cfg.base.num_frames - 1) * cfg.base.frame_stride + 1
    least = given.min_frames or span
    journal = f"{given.out}.part"
    with writing("out", given.out):
        with ProgressLog("check") as progress:
            found = check(list(classes), least, given.fully, given.processes, progress, journal, first.decoder)
        findings = find_repeats(lines) + found
        write_findings(given.out, findings)
        table = count_problems(findings, classes)
        file = f"{os.path.splitext(given.out)[0]}_classes.csv"
        _write_classes(file, table, Counter(name for names in classes.values() for name in names))
        os.remove(journal)
    share = broken_share(findings, len(classes))
    allowed = cfg.dataset.max_bad_fraction if given.max_broken is None else given.max_broken
    _say_findings(findings, table, len(classes))
    print(f"{share:.2%} are missing or unreadable, {allowed:.2%} are allowed; see {given.out} and {file}")
    if share > allowed:
        raise SystemExit(1)


def _datasets(cfg: DictConfig, split: str) -> list[VideoDataset]:
    require_dataset_keys(cfg)
    if "prepare" in cfg.dataset:
        instantiate(cfg.dataset.prepare)
    found = [instantiate(cfg.dataset[part], decoder=PyAV()) for part in SPLITS[split]]
    for note in dict.fromkeys(note for dataset in found for note in dataset.notes):
        print(f"note: {note}")
    return found


def _write_classes(file: str, table: dict[str, Counter[str]], sizes: Counter[str]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as target:
        rows = csv.writer(target)
        rows.writerow(("class", "videos", "problem", "count"))
        for name in sorted(table):
            for problem, count in sorted(table[name].items()) if name else ():
                rows.writerow((name, sizes[name], problem, count))


def _say_findings(findings: Sequence[Finding], table: dict[str, Counter[str]], total: int) -> None:
    print(f"{total} videos, {len({finding.path for finding in findings})} with something to say about")
    if not findings:
        return
    problems = sorted(table[""])
    shown = Table(box=None, pad_edge=False)
    for name in ("", *problems):
        shown.add_column(name, justify="right" if name else "left")
    worst = sorted((name for name in table if name), key=lambda name: (-table[name].total(), name))
    for name in ("", *worst[:CLASSES_SHOWN]):
        shown.add_row(name or "all", *(str(table[name][problem]) for problem in problems))
    Console(soft_wrap=True, highlight=False, markup=False).print(shown)
    if len(worst) > CLASSES_SHOWN:
        print(f"and {len(worst) - CLASSES_SHOWN} classes with less")


def build_pyramid(given: PyramidKeys, cfg: DictConfig) -> None:
    """Build the pyramid of a dataset for the plan that a config composes, and say what it takes."""
    datasets = _datasets(cfg, given.split)
    require(
        all(isinstance(dataset.decoder, PyAV) for dataset in datasets),
        f"dataset {cfg.dataset.name}: frames are images, no video to encode",
    )
    # the grids are those of a whole dataset, also where it is a part of one that is prepared
    plan = build_plan(cfg, max(len(datasets[0]), 1000 * cfg.base.batch_size))
    root = cfg.dataset.root
    paths = list(dict.fromkeys(dataset.path(index) for dataset in datasets for index in range(len(dataset))))
    sizes = {slot.grid.size for phase in plan.phases for slot in phase.slots}
    layout = PyramidLayout.for_sizes(sizes, plan.base.short_side, _short_side(paths))
    print(
        f"levels with short sides of {', '.join(map(str, layout.sides))} pixels for {len(paths)} videos in {given.out}"
    )

    def estimate(level_bytes: int) -> None:
        print(f"the levels of those left will take about {_size(level_bytes)}", flush=True)

    names = [relative(path, root) for path in paths]
    with ProgressLog("pyramid") as progress:
        rows = encode_pyramid(str(given.out), root, names, layout, given.processes, progress, estimate)
    _say_rows(rows, cfg.dataset.max_bad_fraction)
    print(f"train with dataset.pyramid={given.out}")


def _short_side(paths: Sequence[str]) -> int:
    """The usual short side of the originals: the median of some of them."""
    sides = []
    for path in paths[:: max(1, len(paths) // SIDES_SAMPLED)]:
        try:
            with PyAV().open(path) as video:
                sides.append(min(video.height, video.width))
        except DecodeError:
            continue
    if not sides:
        raise UserError(f"none of the videos can be read, for instance {paths[0]}; try mgvideo prepare check")
    return sorted(sides)[len(sides) // 2]


def _say_rows(rows: Sequence[ManifestRow], allowed: float) -> None:
    failed = [row for row in rows if row.failure]
    before, levels = sum(row.bytes for row in rows), sum(row.level_bytes for row in rows)
    print(
        f"{len(rows) - len(failed)} videos: {_size(levels)} beside {_size(before)} of originals "
        f"({levels / max(1, before):.2f} times), {_size(before + levels)} in all"
    )
    if failed:
        print(
            f"{len(failed)} are left to be read from the original, for instance {failed[0].path}: {failed[0].failure}"
        )
    if len(failed) > allowed * len(rows):
        print(f"error: that is more than dataset.max_bad_fraction={allowed}", file=sys.stderr)
        raise SystemExit(1)


def _size(count: int) -> str:
    power = next((power for power in (4, 3, 2, 1) if count >= 1000**power), 0)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def write_lists(given: ListKeys, cfg: DictConfig) -> None:
    """Write `path label` lists of the files that are there."""
    out = Path(str(given.out))
    datasets = _datasets(cfg, given.split)
    with writing("out", out):
        out.mkdir(parents=True, exist_ok=True)
        for split, dataset in zip(SPLITS[given.split], datasets, strict=True):
            written = _list_lines(dataset)
            require(
                bool(written), f"none of the {len(dataset)} {split} videos is there, for instance {dataset.path(0)}"
            )
            file = out / f"{split}.csv"
            require(os.path.abspath(file) != _annotation(cfg, split), f"{file} is what the list is made from: set out")
            file.write_text("".join(written), encoding="utf-8", errors="surrogateescape")
            print(f"{file}: {len(written)} videos, {len(dataset) - len(written)} not there and left out")
        names = "".join(f"{name}\n" for name in datasets[0].class_names)
        (out / "classes.txt").write_text(names, encoding="utf-8", errors="surrogateescape")
    print(f"{out / 'classes.txt'}: {len(datasets[0].class_names)} classes, in the order of their labels")


def _list_lines(dataset: VideoDataset) -> list[str]:
    """A line for each video that is there."""
    if dataset.labels.ndim != 1 or dataset.has_spans:
        raise UserError("a list holds one label a video and no times, and this dataset has more: use it as it is")
    try:
        with ThreadPoolExecutor(16) as pool:  # a network's file system answers many at a time
            there = list(pool.map(exists, map(dataset.path, range(len(dataset)))))
    except OSError as error:
        raise UserError(f"dataset.root={dataset.root}: cannot be read: {error.strerror}") from error
    places = [i for i, found in enumerate(there) if found]
    lines = [f"{list_line(relative(dataset.path(i), dataset.root), int(dataset.labels[i]))}\n" for i in places]
    try:
        "".join(lines).encode()
    except UnicodeEncodeError as error:
        path = next(dataset.path(i) for i, line in zip(places, lines, strict=True) if error.object[error.start] in line)
        raise UserError(f"{path!a}: the name is not UTF-8, as that of a listed file must be; rename it") from None
    return lines


def _annotation(cfg: DictConfig, split: str) -> str:
    return os.path.abspath(os.path.join(cfg.dataset.root, cfg.dataset[split].get("list_file") or ""))


def make_videos(given: MotionKeys, cfg: DictConfig) -> None:
    """Make the embedded dataset."""
    with ProgressLog("motion") as progress:
        folder = make_motion(cfg.dataset.root, instantiate(cfg.dataset.knobs), given.processes, progress)
    files = list(folder.rglob("*.mp4"))
    print(f"{folder}: {len(files)} videos, {_size(sum(file.stat().st_size for file in files))}")
    lists = f"dataset=kinetics400 dataset.root={folder} dataset.num_classes={cfg.dataset.num_classes}"
    print(f"read it with {lists} dataset.train.flip=false")


def _motion_overrides(given: MotionKeys, rest: Sequence[str]) -> list[str]:
    """The knobs by their short names, as overrides of a run: `width=340` is `dataset.knobs.width=340`."""
    names = {f.name for f in fields(Knobs)}
    kinetics = KINETICS if given.like == "kinetics" else ()
    words = [f"dataset.knobs.{word}" if word.split("=")[0] in names else word for word in (*kinetics, *rest)]
    return ["dataset=motion", *words]


COMMANDS = {
    "check": Command(CheckKeys, check_files, "decode a dataset's files and say what is wrong with them"),
    "pyramid": Command(PyramidKeys, build_pyramid, "encode a dataset once more, quick to read coarse clips from"),
    "list": Command(ListKeys, write_lists, "make list files from official annotations and what is on disk"),
    "motion": Command(MotionKeys, make_videos, "make the embedded dataset; width=340 stands for dataset.knobs.width"),
}
