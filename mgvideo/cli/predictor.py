"""Run a trained network on videos: what `mgvideo predict` and `mgvideo features` share."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.lists import read_classes
from mgvideo.datasets.sampling import Sampling, target_ratio
from mgvideo.datasets.scan import scan_folder
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.engine.evaluation import Evaluator, Scores, Views
from mgvideo.engine.precision import Normalize, Precision, choose_precision
from mgvideo.engine.tasks import TASKS, Task
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader
from mgvideo.models.cam import class_maps, sum_pathway_maps
from mgvideo.plan.plan import require
from mgvideo.storage.paths import exists, is_remote, strip_file_scheme

from . import app
from .build import build_normalize, build_sampling, loader_options
from .overlay import HeatMaps
from .progress import ProgressLog
from .schema import key
from .trained import Trained

Span = tuple[float, float]  # start and end, in seconds of the video
WHOLE: Span = (0.0, math.inf)


@dataclass
class ViewKeys:
    """Keys of programs that run a trained network on videos, besides the keys of a run."""

    ckpt: str | None = key(
        None, "a checkpoint, a run's folder (best checkpoint, else newest), or weights as in init_from"
    )
    clips: int | None = key(None, "clips per video, evenly spaced; null: test.num_clips of the run", least=1)
    crops: int | None = key(None, "crops per clip, 1 or 3; null: test.num_crops", choices=(1, 3))
    size: int | None = key(None, "side of a crop in pixels; null: test.crop_size", least=1)


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
    def sampling(self) -> Sampling:
        """How the run samples a test clip."""
        return build_sampling(self.trained.cfg, Sampling(flip=False, segments=self.samples_segments))

    @cached_property
    def task(self) -> Any:
        """The task, which turns logits into scores by softmax or sigmoid."""
        return TASKS[self.trained.cfg.dataset.task]()

    def score_videos(self, paths: Sequence[str], spans: Sequence[Span] | None = None) -> Scores:
        """Score videos as the test of a run does: average (single label) or maximum (multi label) over views.

        `spans` are the parts of the videos to take the clips from, one for each path; None: the whole videos.
        """
        return self.run(self.trained.model, self.task, len(self.names), paths, spans or [WHOLE] * len(paths))

    def run(
        self,
        model: nn.Module,
        task: Task,
        outputs: int,
        paths: Sequence[str],
        spans: Sequence[Span],
        name: str = "predict",
    ) -> Scores:
        """Run a model with `outputs` output channels on every view, and combine the views as the task says."""
        cfg = self.trained.cfg
        sampling = self.sampling
        label: Any = 0 if task.zero_labels(1, outputs).ndim == 1 else ()
        decoder = PyAV(shrink=sampling.antialias)
        entries = [VideoEntry(path, label, span) for path, span in zip(paths, spans, strict=True)]
        dataset = VideoDataset("", entries, [str(output) for output in range(outputs)], decoder, sampling)
        loader = Loader(dataset, loader_options(cfg), self.precision.device.type == "cuda")
        evaluator = Evaluator(loader, task, outputs, self.normalize, self.precision, cfg.test.batch_size)
        with ProgressLog(name) as progress:
            return evaluator(model, self.views, lambda done, of, _: progress(done, of))

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
            stride = grid.strides[0] * target_ratio(self.sampling, video, 0, video.frames)[0]
            span = video.frames if self.samples_segments else max(1, round(grid.frames * stride))
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


def is_video(word: str) -> bool:
    """Return whether an argument is a path or URL rather than `key=value`. Paths and URLs may contain `=`."""
    return os.path.exists(word) or is_remote(word) or not ("=" in word or word.startswith("-"))


def find_videos(words: Sequence[str]) -> dict[str, str]:
    """Map the path of each video to its name: its path inside the given folder, or its file name.

    Raises:
        UserError: There is no video.
    """
    require(bool(words), "no video given: name videos or folders before the keys, as in VIDEO… ckpt=PATH")
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


def build_predictor(options: ViewKeys, trained: Trained, names: Sequence[str] = ()) -> Predictor:
    """Move the network to its device and take the views of its run's test, except where `options` sets them.

    `names` are those of the classes, which only scores need. What is loaded is printed to stderr.
    """
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
    grid = views.grid
    shape = f"{grid.frames} frames at stride {grid.strides[0]}, {grid.size} pixels"
    print(trained.load_summary, file=sys.stderr)
    print(f"{trained}: {views.num_clips}×{views.num_crops} views (clips × crops) of {shape}", file=sys.stderr)
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
