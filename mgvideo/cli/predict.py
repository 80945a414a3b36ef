"""`mgvideo predict`: the top classes of videos, as a table, as JSON, or drawn into copies of the videos."""

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

from mgvideo.cli.overlay import HeatMaps, annotate_video, choose_output_paths
from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.datasets.lists import read_classes
from mgvideo.datasets.sampling import Sampling
from mgvideo.datasets.scan import scan_folder
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.engine.evaluation import Evaluator, Scores, Views
from mgvideo.engine.precision import Normalize, Precision, choose_precision
from mgvideo.engine.tasks import TASKS
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader
from mgvideo.models.cam import class_maps, sum_pathway_maps
from mgvideo.plan.plan import require
from mgvideo.storage.paths import exists, is_remote, strip_file_scheme

from . import app, keys
from .build import build_normalize, loader_options
from .progress import ProgressLog
from .schema import key
from .trained import HELP, Trained, load_trained


@dataclass
class PredictKeys:
    """Keys of this program, besides the videos and the keys of a run."""

    ckpt: str | None = key(
        None, "a checkpoint, a run's folder (best checkpoint, else newest), or weights as in init_from"
    )
    top: int = key(5, "classes to print for each video", least=1)
    clips: int | None = key(None, "clips per video, evenly spaced; null: test.num_clips of the run", least=1)
    crops: int | None = key(None, "crops per clip, 1 or 3; null: test.num_crops", choices=(1, 3))
    size: int | None = key(None, "side of a crop in pixels; null: test.crop_size", least=1)
    classes: str | None = key(
        None, "file of class names, one per line; null: those of the run, else of its dataset, else numbers"
    )
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "folder for copies of the videos with their top classes drawn in")
    cam: bool = key(False, "with out: also draw a class-activation map (heat map) of the top class")


@dataclass(frozen=True)
class Predictor:
    """A trained network with the views, precision, normalisation and class names to predict with."""

    trained: Trained
    views: Views
    precision: Precision
    normalize: Normalize
    names: Sequence[str]

    @property
    def samples_segments(self) -> bool:
        """Whether a clip takes one frame from each segment of the video: the key `segments` of the dataset's split."""
        return bool(self.trained.cfg.dataset.val.get("segments", False))

    @cached_property
    def task(self) -> Any:
        """The task, which turns logits into scores by softmax or sigmoid."""
        return TASKS[self.trained.cfg.dataset.task]()

    def score_videos(self, paths: Sequence[str]) -> Scores:
        """Score whole videos as the test of a run does: average (single label) or maximum (multi label) over views."""
        cfg = self.trained.cfg
        label: Any = 0 if cfg.dataset.task == "single_label" else ()
        sampling = Sampling(flip=False, segments=self.samples_segments)
        dataset = VideoDataset("", [VideoEntry(path, label) for path in paths], self.names, PyAV(), sampling)
        loader = Loader(dataset, loader_options(cfg), self.precision.device.type == "cuda")
        evaluator = Evaluator(loader, self.task, len(self.names), self.normalize, self.precision, cfg.test.batch_size)
        with ProgressLog("predict") as progress:
            return evaluator(self.trained.model, self.views, lambda done, of, _: progress(done, of))

    def check_heat_maps(self) -> None:
        """Raise UserError if class-activation maps of this network do not exist."""
        grid = self.views.grid
        clip = torch.randint(0, 256, (1, grid.frames, grid.size, grid.size, 3), dtype=torch.uint8)
        with torch.no_grad(), self.precision.autocast():
            try:
                class_maps(self.trained.model, self.normalize(clip.to(self.precision.device)), 0)
            except UserError as error:
                raise UserError(f"cam=true: model={self.trained.name}: {error}") from error

    def heat_maps(self, path: str, label: int) -> HeatMaps:
        """Compute class-activation maps of a class over a whole video, scaled so that their maximum is 1.

        Evenly spaced windows, each as long as a clip, cover the video; the last one ends with the video. The network
        sees whole frames, not crops. Raises DecodeError.
        """
        grid = self.views.grid
        maps = []
        with PyAV().open(path, grid.size) as video, torch.no_grad(), self.precision.autocast():
            span = video.frames if self.samples_segments else grid.frames * grid.strides[0]
            room, windows = max(0, video.frames - span), -(-video.frames // span)
            starts = np.linspace(0, room, windows).round().astype(int).tolist()
            for start in starts:
                positions = start + (np.arange(grid.frames) + 0.5 * self.samples_segments) * (span / grid.frames)
                frames = video.read(np.minimum(positions.astype(int), video.frames - 1))
                clip = self.normalize(resize_short_side(frames, grid.size)[None].to(self.precision.device))
                maps.append(sum_pathway_maps(class_maps(self.trained.model, clip, label)))
            heat = torch.cat(maps).clamp(min=0).cpu()
            return HeatMaps(heat / heat.max().clamp(min=1e-12), starts, span, video.frames)


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Resize frames, uint8 `[t, h, w, 3]`, to this short side and keep the aspect ratio."""
    scale = short_side / min(frames.shape[1:3])
    size = [round(side * scale) for side in frames.shape[1:3]]
    return interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo predict` and tools/predict.py."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return
    videos = [word for word in arguments if is_video(word)]
    own_overrides, run_overrides = keys.split(PredictKeys, [word for word in arguments if word not in videos])
    with app.exit_on_user_error():
        options = read_keys(own_overrides)
        run(options, find_videos(videos), run_overrides)


def is_video(word: str) -> bool:
    """Return whether an argument is a path or URL rather than `key=value`. Paths and URLs may contain `=`."""
    return os.path.exists(word) or is_remote(word) or not ("=" in word or word.startswith("-"))


def _help() -> str:
    lines = ["Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …", ""]
    lines += ["A VIDEO is a file, a URL, or a folder with videos at any depth. Exit code 1: a video failed."]
    return "\n".join([*lines, *HELP, "", *keys.describe(PredictKeys)])


def read_keys(overrides: Sequence[str]) -> PredictKeys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(PredictKeys, overrides)
    require(options.out is not None or not options.cam, "cam=true needs a folder to write to: add out=FOLDER")
    return options


def find_videos(words: Sequence[str]) -> dict[str, str]:
    """Map the path of each video to its name below `out`. A folder adds all videos below it."""
    require(bool(words), "no video given: python tools/predict.py VIDEO… ckpt=PATH")
    videos: dict[str, str] = {}
    for word in map(strip_file_scheme, words):
        if not os.path.isdir(word):
            videos[word] = os.path.basename(word)
            continue
        scan = scan_folder(word)
        notes = scan.notes(word)
        require(bool(scan.videos), "; ".join([f"{word}: no videos in this folder", *notes]))
        videos |= {os.path.join(word, video): video for video in scan.videos}
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return videos


def run(options: PredictKeys, videos: dict[str, str], overrides: Sequence[str]) -> None:
    """Score the videos, print the results and draw them. Exits with 1 if a video cannot be read or written."""
    predictor = build_predictor(options, load_trained(options.ckpt, overrides, PredictKeys))
    if options.cam:
        predictor.check_heat_maps()
    targets = choose_output_paths(videos, Path(options.out)) if options.out is not None else {}
    grid, views = predictor.views.grid, predictor.views
    print(predictor.trained.load_summary, file=sys.stderr)
    shape = f"{grid.frames} frames at stride {grid.strides[0]}, {grid.size} pixels"
    print(f"{predictor.trained}: {views.num_clips}×{views.num_crops} views (clips × crops) of {shape}", file=sys.stderr)
    paths = list(videos)
    result = predictor.score_videos(paths)
    reasons = {paths[failure.index]: failure.reason for failure in result.failures}
    scores = zip(paths, result.scores, strict=True)
    rows = {path: top_classes(predictor, row, options.top) for path, row in scores}
    for path in [path for path in targets if path not in reasons]:
        reasons |= draw_predictions(predictor, path, targets[path], rows[path], options.cam)
    print_predictions(options, rows, reasons)
    for path, reason in reasons.items():
        print(f"error: {path}: {reason}", file=sys.stderr)
    if reasons:
        raise SystemExit(1)


def build_predictor(options: PredictKeys, trained: Trained) -> Predictor:
    """Move the network to its device and take the views of its run's test, except where `options` sets them."""
    cfg = trained.cfg
    views = Views.of_size(
        cfg.base.num_frames,
        cfg.base.frame_stride,
        options.size or cfg.test.crop_size,
        options.clips or cfg.test.num_clips,
        options.crops or cfg.test.num_crops,
    )
    precision = choose_precision(cfg.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if precision.warning:
        print(f"warning: {precision.warning}", file=sys.stderr)
    precision.place(trained.model)
    names = read_class_names(options.classes, trained)
    return Predictor(trained, views, precision, build_normalize(cfg, precision), names)


def read_class_names(file: str | None, trained: Trained) -> list[str]:
    """Read the class names from `file`, else the run's folder, else the dataset; else return numbers as names."""
    cfg, classes = trained.cfg, trained.classes
    if file is None and trained.folder and (trained.folder / "classes.txt").exists():
        file = str(trained.folder / "classes.txt")
    if file is not None:
        require(exists(file), f"classes={file}: there is no such file")
        names = read_classes(file)
        require(len(names) == classes, f"classes={file}: {len(names)} names for {classes} classes")
        return names
    try:
        _ = cfg.dataset.root  # read first: if it is missing, the error names it and not a key that refers to it
        names = instantiate(cfg.dataset.val, decoder=PyAV()).class_names
        reason = f"it has {len(names)} classes, the network {classes}"
    except (UserError, HydraException, OmegaConfBaseException) as error:
        names, reason = [], str(app.explain(error))
    if len(names) == classes:
        return names
    print(f"note: classes are numbers: {reason}; name them with classes=FILE, one per line", file=sys.stderr)
    return [str(label) for label in range(classes)]


TopClasses = list[tuple[int, str, float]]  # (label, name, score), highest score first


def top_classes(predictor: Predictor, scores: Tensor, count: int) -> TopClasses:
    """Return the `count` classes with the highest scores."""
    best = scores.topk(min(count, len(scores)))
    return [
        (label, predictor.names[label], score)
        for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw_predictions(predictor: Predictor, path: str, target: Path, row: TopClasses, cam: bool) -> dict[str, str]:
    """Write a copy of one video with its top classes and, with `cam`, the heat maps of the first.

    Returns:
        `{path: reason}` if that fails, else `{}`.
    """
    try:
        heat = predictor.heat_maps(path, row[0][0]) if cam else None
        annotate_video(path, target, [f"{score:.2f} {name}" for _, name, score in row], heat)
    except DecodeError as error:
        return {path: error.reason}
    except OSError as error:
        return {path: f"cannot be written to {target}: {error.strerror or error}"}
    except av.FFmpegError as error:  # not an OSError, so not about a file
        return {path: f"cannot be encoded as H.264: {error.strerror or error}"}
    print(f"{path} → {target}", file=sys.stderr)
    return {}


def print_predictions(options: PredictKeys, rows: dict[str, TopClasses], reasons: dict[str, str]) -> None:
    """Print the top classes of each video, or why it failed."""
    if options.format == "json":
        entries = [{"video": path, **_as_json(row, reasons.get(path))} for path, row in rows.items()]
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("video", "class", "score"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    for path, row in rows.items():
        for rank, (_, name, score) in enumerate(row if path not in reasons else [(0, reasons[path], None)]):
            table.add_row("" if rank else path, name, "" if score is None else f"{score:.4f}")
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _as_json(row: TopClasses, reason: str | None) -> dict[str, Any]:
    if reason is not None:
        return {"error": reason}
    return {"classes": [{"label": label, "class": name, "score": score} for label, name, score in row]}
