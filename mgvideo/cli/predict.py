"""`mgvideo predict`: what a trained network sees in videos, as a table, as JSON or drawn into them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.datasets.lists import read_classes
from mgvideo.datasets.overlay import Heat, annotate, choose_targets
from mgvideo.datasets.sampling import Sampling
from mgvideo.datasets.scan import scan_folder
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.engine.evaluation import Evaluator, Scores, Views
from mgvideo.engine.precision import Normalize, Precision, choose_precision
from mgvideo.engine.tasks import TASKS
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader
from mgvideo.models.cam import class_maps, joined
from mgvideo.plan.plan import Grid, require
from mgvideo.storage.paths import exists, is_remote, plain

from . import app, keys
from .build import build_normalize, loader_options
from .progress import ProgressLog
from .schema import key
from .trained import HELP, Trained, load_trained


@dataclass
class PredictKeys:
    """What this program takes besides videos and the keys of a run."""

    ckpt: str | None = key(
        None, "a checkpoint, a run's folder (its best one, else its newest), or weights as init_from"
    )
    top: int = key(5, "classes to show of each video")
    clips: int | None = key(None, "clips of each video, evenly spaced; null: test.num_clips of the run")
    crops: int | None = key(None, "crops of each clip, 1 or 3; null: test.num_crops")
    size: int | None = key(None, "side of the crops in pixels; null: test.crop_size")
    classes: str | None = key(
        None, "file of class names, one a line; null: the run says, or its dataset, or they are numbers"
    )
    format: str = key("table", "table or json")
    out: str | None = key(None, "folder to write the videos to once more, their top classes drawn in")
    cam: bool = key(False, "with out: blend in where and when the top class is seen, as a heat map")


@dataclass(frozen=True)
class Predictor:
    """A network and how it is to look at videos."""

    trained: Trained
    views: Views
    precision: Precision
    normalize: Normalize
    names: Sequence[str]

    @property
    def segments(self) -> bool:
        """Whether its dataset takes a frame of each segment of a video: Something-Something does."""
        return self.trained.cfg.dataset.val._target_.endswith(".ssv2")

    @cached_property
    def task(self) -> Any:
        """Softmax or sigmoid."""
        return TASKS[self.trained.cfg.dataset.task]()

    def scores(self, paths: Sequence[str]) -> Scores:
        """Scores of whole videos, as the test of a run computes them."""
        cfg = self.trained.cfg
        label: Any = 0 if cfg.dataset.task == "single_label" else ()
        sampling = Sampling(flip=False, segments=self.segments)
        dataset = VideoDataset("", [VideoEntry(path, label) for path in paths], self.names, PyAV(), sampling)
        loader = Loader(dataset, loader_options(cfg), self.precision.device.type == "cuda")
        evaluator = Evaluator(loader, self.task, len(self.names), self.normalize, self.precision, cfg.test.batch_size)
        with ProgressLog("predict") as progress:
            return evaluator(self.trained.model, self.views, lambda done, of, _: progress(done, of))

    def heat(self, path: str, label: int) -> Heat:
        """Where and when a class is seen, relative to the hottest place of the video: whole frames, not crops.

        Windows as long as a clip cover the video; the last one ends with it. Raises DecodeError.
        """
        grid = self.views.grid
        maps = []
        with PyAV().open(path, grid.size) as video, torch.no_grad(), self.precision.autocast():
            span = video.frames if self.segments else grid.frames * grid.strides[0]
            room, windows = max(0, video.frames - span), -(-video.frames // span)
            starts = np.linspace(0, room, windows).round().astype(int).tolist()
            for start in starts:
                places = start + (np.arange(grid.frames) + 0.5 * self.segments) * (span / grid.frames)
                frames = video.read(np.minimum(places.astype(int), video.frames - 1))
                clip = self.normalize(resized(frames, grid.size)[None].to(self.precision.device))
                maps.append(joined(class_maps(self.trained.model, clip, label)))
            heat = torch.cat(maps).clamp(min=0).cpu()
            return Heat(heat / heat.max().clamp(min=1e-12), starts, span, video.frames)


def resized(frames: Tensor, short_side: int) -> Tensor:
    """Frames uint8 `[t, h, w, 3]` of this short side, their proportions kept."""
    scale = short_side / min(frames.shape[1:3])
    size = [round(side * scale) for side in frames.shape[1:3]]
    return interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo predict` and tools/predict.py."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return
    videos = [word for word in arguments if is_video(word)]
    own, rest = keys.split(PredictKeys, [word for word in arguments if word not in videos])
    with app.exit_on_user_error():
        given = read_keys(own)
        run(given, find(videos), rest)


def is_video(word: str) -> bool:
    """Whether an argument is a path or a URL of videos; either may have `=` in it, as keys have."""
    return os.path.exists(word) or is_remote(word) or not ("=" in word or word.startswith("-"))


def _help() -> str:
    lines = ["Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …", ""]
    lines += [
        "A VIDEO is a file, a URL, or a folder: all videos in it, at any depth. Exit code 1: one could not be read."
    ]
    return "\n".join([*lines, *HELP, "", *keys.describe(PredictKeys)])


def read_keys(overrides: Sequence[str]) -> PredictKeys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(PredictKeys, overrides)
    for name in ("top", "clips", "size"):
        value = getattr(given, name)
        require(value is None or value >= 1, f"{name}={value}: give a whole number from 1 up")
    require(given.crops in (None, 1, 3), f"crops={given.crops}: choose 1 or 3")
    require(given.format in ("table", "json"), f"format={given.format}: choose table or json")
    require(given.out is not None or not given.cam, "cam=true needs a folder to write to: add out=FOLDER")
    return given


def find(words: Sequence[str]) -> dict[str, str]:
    """Videos by their path, with what they are called under `out`: those named, and all in the folders named."""
    require(bool(words), "no video given: python tools/predict.py VIDEO… ckpt=PATH")
    found: dict[str, str] = {}
    for word in map(plain, words):
        if not os.path.isdir(word):
            found[word] = os.path.basename(word)
            continue
        scan = scan_folder(word)
        notes = scan.notes(word)
        require(bool(scan.videos), "; ".join([f"{word}: no videos in this folder", *notes]))
        found |= {os.path.join(word, video): video for video in scan.videos}
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return found


def run(given: PredictKeys, videos: dict[str, str], overrides: Sequence[str]) -> None:
    """Score the videos and show what came out; exits with 1 where one could not be read."""
    predictor = build(given, load_trained(given.ckpt, overrides, PredictKeys))
    targets = choose_targets(videos, Path(given.out)) if given.out is not None else {}
    grid, views = predictor.views.grid, predictor.views
    print(predictor.trained.taken, file=sys.stderr)
    shape = f"{grid.frames} frames at stride {grid.strides[0]}, {grid.size} pixels"
    print(f"{predictor.trained}: {views.num_clips}×{views.num_crops} views (clips × crops) of {shape}", file=sys.stderr)
    paths = list(videos)
    result = predictor.scores(paths)
    reasons = {paths[failure.index]: failure.reason for failure in result.failures}
    rows = {path: _top(predictor, scores, given.top) for path, scores in zip(paths, result.scores, strict=True)}
    for path in [path for path in targets if path not in reasons]:
        reasons |= draw(predictor, path, targets[path], rows[path], given.cam)
    show(given, rows, reasons)
    for path, reason in reasons.items():
        print(f"error: {path}: {reason}", file=sys.stderr)
    if reasons:
        raise SystemExit(1)


def build(given: PredictKeys, trained: Trained) -> Predictor:
    """The network on its device, with the views of its run's test but for what is asked."""
    cfg = trained.cfg
    side = given.size or cfg.test.crop_size
    grid = Grid(cfg.base.num_frames, side, (cfg.base.frame_stride, cfg.base.frame_stride), (side, side))
    views = Views(grid, given.clips or cfg.test.num_clips, given.crops or cfg.test.num_crops)
    precision = choose_precision(cfg.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if precision.warning:
        print(f"warning: {precision.warning}", file=sys.stderr)
    precision.place(trained.model)
    names = class_names(given.classes, trained)
    return Predictor(trained, views, precision, build_normalize(cfg, precision), names)


def class_names(file: str | None, trained: Trained) -> list[str]:
    """Names from a file, from the run's folder, from the dataset where it is at hand, or numbers."""
    cfg, classes = trained.cfg, trained.classes
    if file is None and trained.folder and (trained.folder / "classes.txt").exists():
        file = str(trained.folder / "classes.txt")
    if file is not None:
        require(exists(file), f"classes={file}: there is no such file")
        names = read_classes(file)
        require(len(names) == classes, f"classes={file}: {len(names)} names for {classes} classes")
        return names
    try:
        _ = cfg.dataset.root  # other keys refer to it: the one to name where it is missing
        names = instantiate(cfg.dataset.val, decoder=PyAV()).class_names
        reason = f"it has {len(names)} classes, the network {classes}"
    except (UserError, HydraException, OmegaConfBaseException) as error:
        names, reason = [], str(app.explain(error))
    if len(names) == classes:
        return names
    print(f"note: classes are numbers: {reason}; classes=FILE names them, one a line", file=sys.stderr)
    return [str(label) for label in range(classes)]


Row = list[tuple[int, str, float]]  # label, name and score of the top classes, best first


def _top(predictor: Predictor, scores: Tensor, count: int) -> Row:
    best = scores.topk(min(count, len(scores)))
    return [
        (label, predictor.names[label], score)
        for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw(predictor: Predictor, path: str, target: Path, row: Row, cam: bool) -> dict[str, str]:
    """Write one video with its classes, and the top one's heat, drawn in; the reason by the path where that fails."""
    try:
        heat = predictor.heat(path, row[0][0]) if cam else None
        annotate(path, target, [f"{score:.2f} {name}" for _, name, score in row], heat)
    except DecodeError as error:
        return {path: error.reason}
    except OSError as error:
        return {path: f"cannot be written to {target}: {error.strerror or error}"}
    except av.FFmpegError as error:  # those that are no OSError are not about a file
        return {path: f"cannot be encoded as H.264: {error.strerror or error}"}
    print(f"{path} → {target}", file=sys.stderr)
    return {}


def show(given: PredictKeys, rows: dict[str, Row], reasons: dict[str, str]) -> None:
    """Print the classes of each video, or what is wrong with it."""
    if given.format == "json":
        found = [{"video": path, **_as_json(row, reasons.get(path))} for path, row in rows.items()]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("video", "class", "score"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    for path, row in rows.items():
        for place, (_, name, score) in enumerate(row if path not in reasons else [(0, reasons[path], None)]):
            table.add_row("" if place else path, name, "" if score is None else f"{score:.4f}")
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _as_json(row: Row, reason: str | None) -> dict[str, Any]:
    if reason is not None:
        return {"error": reason}
    return {"classes": [{"label": label, "class": name, "score": score} for label, name, score in row]}
