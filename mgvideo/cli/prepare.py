"""`mgvideo prepare`: check a dataset's files, build its pyramid, write list files, or make the embedded dataset."""

from __future__ import annotations

import csv
import os
import shutil
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
from rich.filesize import decimal
from rich.table import Table

from mgvideo.datasets.check import (
    TOO_SHORT,
    Finding,
    broken_share,
    check,
    count_problems,
    find_repeats,
    list_lines,
    write_findings,
)
from mgvideo.datasets.frames import frame_folder
from mgvideo.datasets.lists import list_line
from mgvideo.datasets.motion import Knobs, make_motion
from mgvideo.datasets.pack import pack
from mgvideo.datasets.parallel import parallel_map
from mgvideo.datasets.pyav import PyAV, index_video
from mgvideo.datasets.pyramid import ManifestRow, Pyramid, PyramidLayout, encode_pyramid, pyramid_levels
from mgvideo.datasets.video import VideoDataset
from mgvideo.datasets.videofile import DecodeError
from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.plan.plan import require
from mgvideo.plan.table import set_full_width
from mgvideo.storage.paths import exists, explain_write_errors, is_remote, relative, require_local_path

from . import app, keys
from .build import build_indexes, build_plan, open_any_source, require_dataset_keys
from .draw_clips import ClipKeys, draw_clips
from .progress import ProgressLog
from .recipe import sample_size
from .schema import key

KINETICS = ("width=340", "height=256", "frames=300", "fps=30", "keyframe=250", "train=64", "val=16")
SPLITS = {"train": ("train",), "val": ("val",), "both": ("train", "val")}
MAX_CLASSES_PRINTED = 10
SAMPLED_FILES = 32  # files whose median short side is taken for the whole dataset


@dataclass
class CheckKeys:
    """Keys of `prepare check`."""

    split: str = key("both", "train, val or both", choices=tuple(SPLITS))
    fully: bool = key(True, "decode every frame; false: only the first, middle and last")
    min_frames: int | None = key(
        None, "videos with fewer frames are a problem; null: none, only a note on those shorter than a clip", least=1
    )
    max_broken: float | None = key(
        None, "exit with 1 if a larger share of files is missing or unreadable; null: dataset.max_bad_fraction"
    )
    out: str = key("check.csv", "file for the problems, one per line; OUT_classes.csv counts them by class")
    processes: int | None = key(None, "files checked at a time; null: one per core", least=1)


@dataclass
class PyramidKeys:
    """Keys of `prepare pyramid`."""

    out: str | None = key(None, "folder to build in, for dataset.pyramid; a stopped build resumes")
    split: str = key("both", "train, val or both", choices=tuple(SPLITS))
    processes: int | None = key(None, "files encoded at a time; null: one per core", least=1)


@dataclass
class IndexKeys:
    """Keys of `prepare index`."""

    split: str = key("both", "train, val or both", choices=tuple(SPLITS))
    renew: bool = key(False, "index all files anew, not only new and changed ones")
    processes: int | None = key(None, "files indexed at a time; null: one per core", least=1)


@dataclass
class PackKeys:
    """Keys of `prepare pack`."""

    out: str | None = key(None, "folder for SPLIT-000000.tar, …; a stopped command resumes")
    split: str = key("both", "train, val or both", choices=tuple(SPLITS))
    shard_mib: int = key(1024, "size of an archive in MiB", least=1)
    processes: int | None = key(None, "archives written at a time; null: one per core", least=1)


@dataclass
class ListKeys:
    """Keys of `prepare list`."""

    out: str | None = key(None, "folder for train.csv, val.csv (path label) and classes.txt")
    split: str = key("both", "train, val or both", choices=tuple(SPLITS))


@dataclass
class MotionKeys:
    """Keys of `prepare motion`."""

    like: str = key("motion", "motion, or kinetics: " + " ".join(KINETICS), choices=("motion", "kinetics"))
    processes: int | None = key(None, "files made at a time; null: one per core", least=1)
    folders: str | None = key(
        None, "folder to copy the videos into as train/CLASS/… and val/CLASS/…, for dataset=folder; null: none"
    )
    classes: list[str] = key([], "classes to copy into folders; empty: all")


class Command(NamedTuple):
    """A sub-command: its keys, its function of keys and config, and its help text."""

    keys: type
    task: Callable[[Any, DictConfig], None]
    text: str


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo prepare` and tools/prepare_data.py."""
    name, command_arguments = (arguments or ["--help"])[0], list(arguments[1:])
    if name not in COMMANDS:
        print(_usage())
        if name not in ("-h", "--help"):
            print(f"error: there is no 'prepare {name}'; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
            raise SystemExit(2)
        return
    command = COMMANDS[name]
    own_overrides, run_overrides = keys.split(command.keys, command_arguments)
    options = command.keys()
    if not {"-h", "--help"} & set(run_overrides):
        with app.exit_on_user_error():
            options = read_keys(command.keys, own_overrides)
    if isinstance(options, MotionKeys):
        run_overrides = _motion_overrides(options, run_overrides)
    intro = f"{command.text[0].upper()}{command.text[1:]}. Takes the groups and keys of a run, and:"
    text = "\n".join([intro, "", *keys.describe(command.keys)])
    app.main("run", text, partial(command.task, options), run_overrides, keys.names(command.keys))


def _usage() -> str:
    lines = ["Prepare a dataset. Original files are never changed, and a killed command resumes.", ""]
    lines += [f"  mgvideo prepare {name:<8} {command.text}" for name, command in COMMANDS.items()]
    example = "mgvideo prepare pyramid dataset=kinetics400 dataset.root=/data/k400 out=/data/k400_pyramid"
    return "\n".join([*lines, "", f"Example: {example}", "Add --help to a command to list its keys."])


def read_keys(kind: type, overrides: Sequence[str]) -> Any:
    """Read and check the keys of a sub-command. Raises UserError for an invalid value."""
    options: Any = keys.read(kind, overrides)
    require(getattr(options, "out", "") is not None, "out is not set: add out=FOLDER to the command")
    if isinstance(options, CheckKeys):
        share = options.max_broken
        require(share is None or 0 <= share <= 1, f"max_broken={share}: give a share from 0 to 1")
    return options


def check_files(options: CheckKeys, cfg: DictConfig) -> None:
    """Decode a dataset's files, write the problems to a file and print a summary.

    Exits with 1 if the share of missing and unreadable files exceeds `max_broken`. A stopped check resumes.
    """
    decoder = PyAV(indexes=build_indexes(cfg), renew=True)
    datasets = dict(zip(SPLITS[options.split], _datasets(cfg, options.split, decoder), strict=True))
    first = next(iter(datasets.values()))
    require(
        all(dataset.frames_fps == first.frames_fps for dataset in datasets.values()),
        "one split of the dataset is videos, the other images: check each by itself, with split=train and split=val",
    )
    lines = [line for part, dataset in datasets.items() for line in list_lines(dataset, part)]
    classes: dict[str, set[str]] = {}
    for line in lines:
        classes.setdefault(line.path, set()).update(line.classes)
    # with segment sampling, several segments of a short video return the same frame
    span = 1 if first.sampling.segments else (cfg.base.num_frames - 1) * cfg.base.frame_stride + 1
    min_frames = options.min_frames or span
    journal = f"{options.out}.part"
    with explain_write_errors("out", options.out):
        with ProgressLog("check") as progress:
            problems = check(
                list(classes), min_frames, options.fully, options.processes, progress, journal, first.decoder
            )
        short = [finding for finding in problems if finding.problem == TOO_SHORT and options.min_frames is None]
        findings = find_repeats(lines) + [finding for finding in problems if finding not in short]
        write_findings(options.out, findings)
        table = count_problems(findings, classes)
        file = f"{os.path.splitext(options.out)[0]}_classes.csv"
        _write_classes(file, table, Counter(name for names in classes.values() for name in names))
        os.remove(journal)
    share = broken_share(findings, len(classes))
    allowed = cfg.dataset.max_bad_fraction if options.max_broken is None else options.max_broken
    _print_findings(findings, table, len(classes))
    if short:
        clip = f"base.num_frames={cfg.base.num_frames} at base.frame_stride={cfg.base.frame_stride}"
        print(
            f"note: {len(short)} of {len(classes)} videos have fewer frames than the {span} that a clip of {clip} "
            "spans: training takes them, and clips repeat their last frame; "
            f"min_frames={span} lists them: {shorten(finding.path for finding in short)}"
        )
    print(f"{share:.2%} are missing or unreadable, {allowed:.2%} are allowed; see {options.out} and {file}")
    if share > allowed:
        raise SystemExit(1)


def _datasets(cfg: DictConfig, split: str, decoder: Any = None) -> list[VideoDataset]:
    require_dataset_keys(cfg)
    if "prepare" in cfg.dataset:
        instantiate(cfg.dataset.prepare)
    source = open_any_source(cfg, decoder or PyAV())
    datasets = [instantiate(cfg.dataset[part], decoder=source) for part in SPLITS[split]]
    for note in dict.fromkeys(note for dataset in datasets for note in dataset.notes):
        print(f"note: {note}")
    return datasets


def _write_classes(file: str, table: dict[str, Counter[str]], sizes: Counter[str]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as target:
        rows = csv.writer(target)
        rows.writerow(("class", "videos", "problem", "count"))
        for name in sorted(table):
            for problem, count in sorted(table[name].items()) if name else ():
                rows.writerow((name, sizes[name], problem, count))


def _print_findings(findings: Sequence[Finding], table: dict[str, Counter[str]], total: int) -> None:
    print(f"{total} videos, {len({finding.path for finding in findings})} of them with a problem")
    if not findings:
        return
    problems = sorted(table[""])
    rows = Table(box=None, pad_edge=False)
    for name in ("", *problems):
        rows.add_column(name, justify="right" if name else "left")
    worst = sorted((name for name in table if name), key=lambda name: (-table[name].total(), name))
    for name in ("", *worst[:MAX_CLASSES_PRINTED]):
        rows.add_row(name or "all", *(str(table[name][problem]) for problem in problems))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(rows if console.is_terminal else set_full_width(rows))
    if len(worst) > MAX_CLASSES_PRINTED:
        print(f"and {len(worst) - MAX_CLASSES_PRINTED} classes with fewer problems")


def build_pyramid(options: PyramidKeys, cfg: DictConfig) -> None:
    """Build the pyramid of a dataset for the plan of a config, and print its size."""
    datasets = _datasets(cfg, options.split)
    require(
        all(dataset.frames_fps is None and frame_folder(dataset.path(0)) is None for dataset in datasets),
        f"dataset {cfg.dataset.name}: frames are images, no video to encode",
    )
    # a few videos may be a sample of a dataset: take the grids of a plan of at least 1,000 batches
    plan = build_plan(cfg, sample_size(cfg, len(datasets[0])))
    root = cfg.dataset.root
    paths = list(dict.fromkeys(dataset.path(index) for dataset in datasets for index in range(len(dataset))))
    sizes = {slot.grid.size for phase in plan.phases for slot in phase.slots}
    layout = PyramidLayout.for_sizes(sizes, plan.base.short_side, _short_side(paths))
    print(
        f"levels with short sides of {', '.join(map(str, layout.sides))} pixels "
        f"for {len(paths)} videos in {options.out}"
    )

    def estimate(level_bytes: int) -> None:
        print(f"the levels of the remaining videos will take about {decimal(level_bytes)}", flush=True)

    names = [relative(path, root) for path in paths]
    with ProgressLog("pyramid") as progress:
        indexes = build_indexes(cfg, str(options.out))
        rows = encode_pyramid(str(options.out), root, names, layout, options.processes, progress, estimate, indexes)
    _print_rows(rows, cfg.dataset.max_bad_fraction)
    print(f"train with dataset.pyramid={options.out}")


def index_files(options: IndexKeys, cfg: DictConfig) -> None:
    """Add a dataset's files, and the levels of its pyramid, to the packet index."""
    require(cfg.dataset.get("index") is not None, "dataset.index=null: give auto, or a file to write the index to")
    require_dataset_keys(cfg)
    pyramid = cfg.dataset.get("pyramid")
    indexes = build_indexes(cfg, pyramid)
    require(bool(indexes), f"dataset.root={cfg.dataset.root}: there is no index of a URL; set dataset.index=FILE")
    datasets = _datasets(cfg, options.split)
    paths = list(dict.fromkeys(dataset.path(index) for dataset in datasets for index in range(len(dataset))))
    paths = [path for path in paths if frame_folder(path) is None]
    require(bool(paths), f"dataset {cfg.dataset.name}: frames are images, no video to index")
    if pyramid is not None:
        paths += pyramid_levels(pyramid, cfg.dataset.root, paths)
    work = partial(index_video, PyAV(indexes=indexes, renew=options.renew))
    failures = []
    with ProgressLog("index") as progress:
        for number, failure in enumerate(parallel_map(work, paths, options.processes), start=1):
            failures += [failure] if failure else []
            progress(number, len(paths))
    for index in indexes.values():
        if os.path.exists(index.file):
            print(f"{index.file}: {len(index)} videos, {decimal(os.path.getsize(index.file))}")
    if failures:
        print(f"{len(failures)} of {len(paths)} files cannot be read: {shorten(failures)}")


def _short_side(paths: Sequence[str]) -> int:
    """Return the median short side of a sample of the original files. Raises UserError if none can be read."""
    sides = []
    for path in paths[:: max(1, len(paths) // SAMPLED_FILES)]:
        try:
            with PyAV().open(path) as video:
                sides.append(min(video.height, video.width))
        except DecodeError:
            continue
    if not sides:
        raise UserError(f"none of the videos can be read, for example {paths[0]}; run mgvideo prepare check")
    return sorted(sides)[len(sides) // 2]


def _print_rows(rows: Sequence[ManifestRow], allowed: float) -> None:
    failed = [row for row in rows if row.failure]
    before, levels = sum(row.bytes for row in rows), sum(row.level_bytes for row in rows)
    print(
        f"{len(rows) - len(failed)} videos: {decimal(levels)} beside {decimal(before)} of originals "
        f"({levels / max(1, before):.2f} times), {decimal(before + levels)} in all"
    )
    if failed:
        print(f"{len(failed)} will be read from the original file, for example {failed[0].path}: {failed[0].failure}")
    if len(failed) > allowed * len(rows):
        print(f"error: that is more than dataset.max_bad_fraction={allowed}", file=sys.stderr)
        raise SystemExit(1)


def pack_videos(options: PackKeys, cfg: DictConfig) -> None:
    """Pack a dataset into tar archives, with the levels of `dataset.pyramid` if that is set, and print their number."""
    out = Path(require_local_path("out", str(options.out)))
    datasets = dict(zip(SPLITS[options.split], _datasets(cfg, options.split), strict=True))
    require(
        all(dataset.frames_fps is None for dataset in datasets.values()),
        f"dataset {cfg.dataset.name}: frames are images, no video to pack",
    )
    pyramid = Pyramid(cfg.dataset.pyramid, cfg.dataset.root, PyAV()) if cfg.dataset.get("pyramid") else None
    with explain_write_errors("out", out), ProgressLog("pack") as progress:
        shards = pack(datasets, out, options.shard_mib * 2**20, pyramid, options.processes, progress)
    failures = [failure for shard in shards for failure in shard.failures]
    samples = sum(shard.samples for shard in shards)
    print(f"{out}: {samples} videos in {sum(shard.samples > 0 for shard in shards)} archives")
    if failures:
        path, reason = failures[0]
        print(f"{len(failures)} videos are left out, for example {path}: {reason}")
    print(f"train with dataset=shards dataset.root={out}" + (f" dataset.pyramid={out}" if pyramid else ""))
    if len(failures) > cfg.dataset.max_bad_fraction * (samples + len(failures)):
        print(f"error: that is more than dataset.max_bad_fraction={cfg.dataset.max_bad_fraction}", file=sys.stderr)
        raise SystemExit(1)


def write_lists(options: ListKeys, cfg: DictConfig) -> None:
    """Write `path label` lists of the files that exist, and the class names."""
    out = Path(str(options.out))
    datasets = _datasets(cfg, options.split)
    with explain_write_errors("out", out):
        out.mkdir(parents=True, exist_ok=True)
        for split, dataset in zip(SPLITS[options.split], datasets, strict=True):
            lines = _list_lines(dataset)
            require(bool(lines), f"none of the {len(dataset)} {split} videos exists, for example {dataset.path(0)}")
            file = out / f"{split}.csv"
            require(
                os.path.abspath(file) != _annotation(cfg, split),
                f"{file} is the annotation file of the dataset: set out to another folder",
            )
            file.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            print(f"{file}: {len(lines)} videos, {len(dataset) - len(lines)} missing and left out")
        names = "".join(f"{name}\n" for name in datasets[0].class_names)
        (out / "classes.txt").write_text(names, encoding="utf-8", errors="surrogateescape")
    print(f"{out / 'classes.txt'}: {len(datasets[0].class_names)} classes, in the order of their labels")


def _list_lines(dataset: VideoDataset) -> list[str]:
    """Return a line for each video that exists."""
    if dataset.labels.ndim != 1 or dataset.has_spans:
        raise UserError(
            "a list holds one label per video and no times, but this dataset has more: use it without a list"
        )
    try:
        with ThreadPoolExecutor(16) as pool:  # hides the latency of a network file system
            exist = list(pool.map(_is_video, map(dataset.path, range(len(dataset)))))
    except OSError as error:
        raise UserError(f"dataset.root={dataset.root}: cannot be read: {error.strerror}") from error
    indices = [i for i, file_exists in enumerate(exist) if file_exists]
    lines = [f"{list_line(relative(dataset.path(i), dataset.root), int(dataset.labels[i]))}\n" for i in indices]
    try:
        "".join(lines).encode()
    except UnicodeEncodeError as error:
        path = next(
            dataset.path(i) for i, line in zip(indices, lines, strict=True) if error.object[error.start] in line
        )
        raise UserError(f"{path!a}: the name is not UTF-8, which a list requires; rename the file") from None
    return lines


def _is_video(path: str) -> bool:
    return exists(path) or (not is_remote(path) and frame_folder(path) is not None)


def _annotation(cfg: DictConfig, split: str) -> str:
    return os.path.abspath(os.path.join(cfg.dataset.root, cfg.dataset[split].get("list_file") or ""))


def make_videos(options: MotionKeys, cfg: DictConfig) -> None:
    """Make the embedded dataset, Motion."""
    with ProgressLog("motion") as progress:
        folder = make_motion(cfg.dataset.root, instantiate(cfg.dataset.knobs), options.processes, progress)
    files = list(folder.rglob("*.mp4"))
    print(f"{folder}: {len(files)} videos, {decimal(sum(file.stat().st_size for file in files))}")
    lists = f"dataset=kinetics400 dataset.root={folder} dataset.num_classes={cfg.dataset.num_classes}"
    print(f"read it with {lists} dataset.train.flip=false")
    if options.folders is not None:
        _copy_into_folders(folder, Path(options.folders), options.classes)


def _copy_into_folders(motion: Path, target: Path, classes: Sequence[str]) -> None:
    """Copy videos of Motion into `target`/SPLIT/CLASS."""
    names = (motion / "classes.txt").read_text(encoding="utf-8").splitlines()
    for name in classes:
        require(name in names, f"classes={name}: choose from {', '.join(names)}")
    copied = 0
    with explain_write_errors("folders", target):
        for split in SPLITS["both"]:
            for line in (motion / f"{split}.csv").read_text(encoding="utf-8").splitlines():
                path, label = line.split()
                require(label.isdecimal(), "folders: a video in folders has one class: leave out shapes")
                name = names[int(label)]
                if not classes or name in classes:
                    (target / split / name).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(motion / path, target / split / name / Path(path).name)
                    copied += 1
    print(f"{target}: {copied} of the videos in folders; train with dataset=folder dataset.root={target}")


def _motion_overrides(options: MotionKeys, rest: Sequence[str]) -> list[str]:
    """Expand short names of knobs into overrides of a run: `width=340` becomes `dataset.knobs.width=340`."""
    names = {f.name for f in fields(Knobs)}
    kinetics = KINETICS if options.like == "kinetics" else ()
    words = [f"dataset.knobs.{word}" if word.split("=")[0] in names else word for word in (*kinetics, *rest)]
    return ["dataset=motion", *words]


COMMANDS = {
    "check": Command(CheckKeys, check_files, "decode a dataset's files and report the problems"),
    "pyramid": Command(
        PyramidKeys, build_pyramid, "encode small copies of a dataset, from which coarse clips are read faster"
    ),
    "index": Command(IndexKeys, index_files, "note where the frames of each video lie in its file"),
    "pack": Command(PackKeys, pack_videos, "write a dataset into a few tar archives, pyramid levels included"),
    "list": Command(ListKeys, write_lists, "write list files from official annotations and the files on disk"),
    "clips": Command(ClipKeys, draw_clips, "draw training clips as they are read and as augmentation changes them"),
    "motion": Command(MotionKeys, make_videos, "make the embedded dataset; width=340 stands for dataset.knobs.width"),
}
