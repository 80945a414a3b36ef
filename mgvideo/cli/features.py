"""`mgvideo features`: one feature vector for each video, as a NumPy array with a table of the videos."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
from torch import Tensor

from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.engine.tasks import SingleLabel
from mgvideo.errors import UserError
from mgvideo.models.features import PooledFeatures
from mgvideo.storage.files import write_atomic, write_csv
from mgvideo.storage.paths import explain_write_errors

from . import app, keys
from .predictor import WHOLE, ViewKeys, build_predictor, find_videos, is_video
from .schema import key
from .trained import HELP, load_trained

COLUMNS = ("video", "label", "seconds", "views")  # of features.csv


@dataclass
class FeatureKeys(ViewKeys):
    """Keys of this program, besides the videos and the keys of a run."""

    out: str | None = key(None, "folder for features.npy and features.csv")


class MeanOverViews(SingleLabel):
    """Combines the features of a video's views into their mean."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return the features unchanged."""
        return logits


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo features` and tools/features.py."""
    if {"-h", "--help"} & set(arguments):
        intro = (
            "Write the pooled features of videos: python tools/features.py VIDEO… ckpt=PATH out=FOLDER [key=value] …"
        )
        where = "A VIDEO is a file, a URL, or a folder with videos at any depth. Exit code 1: a video failed."
        print("\n".join([intro, "", where, *HELP, "", *keys.describe(FeatureKeys)]))
        return
    videos = [word for word in arguments if is_video(word)]
    own_overrides, run_overrides = keys.split(FeatureKeys, [word for word in arguments if word not in videos])
    with app.exit_on_user_error():
        run(read_keys(own_overrides), find_videos(videos), run_overrides)


def read_keys(overrides: Sequence[str]) -> FeatureKeys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(FeatureKeys, overrides)
    if options.out is None:
        raise UserError("out is not set: add out=FOLDER to the command, for features.npy and features.csv")
    return options


def run(options: FeatureKeys, videos: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Write the features of all videos that can be read. Exits with 1 if a video cannot be read.

    `videos` maps paths to names, see `find_videos`.
    """
    folder = Path(str(options.out))
    with explain_write_errors("out", folder):
        folder.mkdir(parents=True, exist_ok=True)  # fail now, not after the videos
    predictor = build_predictor(options, load_trained(options.ckpt, overrides, FeatureKeys))
    model = PooledFeatures(predictor.trained.model)
    paths = list(videos)
    result = predictor.run(model, MeanOverViews(), model.channels, paths, [WHOLE] * len(paths), "features")
    reasons = {paths[failure.index]: failure.reason for failure in result.failures}
    durations, unreadable = measure_durations([path for path in paths if path not in reasons])
    reasons |= unreadable
    views = str(predictor.views.num_clips * predictor.views.num_crops)
    table = [(path, PurePath(videos[path]).parent.name, f"{durations[path]:.3f}", views) for path in durations]
    rows = [number for number, path in enumerate(paths) if path in durations]
    write_features(folder, result.scores[rows], table)
    print(f"{folder / 'features.npy'}: [{len(rows)}, {model.channels}] float32, rows as in features.csv")
    for path, reason in reasons.items():
        print(f"error: {path}: {reason}", file=sys.stderr)
    if reasons:
        raise SystemExit(1)


def measure_durations(paths: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of each video, by path; and by path the reason why a video cannot be read."""
    durations, reasons = {}, {}
    for path in paths:
        try:
            with PyAV().open(path) as video:
                durations[path] = float(video.times[-1] - video.times[0])
        except DecodeError as error:
            reasons[path] = error.reason
    return durations, reasons


def write_features(folder: Path, features: Tensor, table: Sequence[Sequence[str]]) -> None:
    """Write features.npy, float32 `[videos, channels]`, and features.csv with a line for each of its rows."""
    array = BytesIO()
    np.save(array, features.float().numpy())
    write_atomic(folder / "features.npy", array.getvalue())
    write_csv(folder / "features.csv", COLUMNS, table)
