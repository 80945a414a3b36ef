"""`mgvideo predict`: the top classes of videos or of windows of them, as a table, CSV or JSON, or drawn into copies."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mgvideo.datasets.decoders import DecodeError
from mgvideo.plan.plan import require
from mgvideo.plan.table import set_full_width

from . import app, keys
from .overlay import annotate_video, choose_output_paths
from .predictor import WHOLE, Predictor, Span, ViewKeys, build_predictor, find_videos, is_video, read_class_names
from .schema import key
from .trained import HELP, load_trained
from .windows import find_windows

TopClasses = list[tuple[int, str, float]]  # (label, name, score), highest score first


@dataclass
class PredictKeys(ViewKeys):
    """Keys of this program, besides the videos and the keys of a run."""

    clips: int | None = key(
        None, "clips per video, evenly spaced; null: test.num_clips of the run, or with window one per window", least=1
    )
    top: int = key(5, "classes to print for each video", least=1)
    classes: str | None = key(
        None, "file of class names, one per line; null: those of the run, else of its dataset, else numbers"
    )
    window: float | None = key(
        None, "seconds of the windows to predict one after the other; null: predict the whole video", above=0
    )
    step: float | None = key(None, "seconds from the start of a window to the next; null: as long as a window", above=0)
    format: str = key("table", "table, csv or json", choices=("table", "csv", "json"))
    out: str | None = key(None, "folder for copies of the videos with their top classes drawn in")
    cam: bool = key(False, "with out: also draw a class-activation map (heat map) of the top class")


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


def _help() -> str:
    lines = ["Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …", ""]
    lines += ["A VIDEO is a file, a URL, or a folder with videos at any depth. Exit code 1: a video failed."]
    return "\n".join([*lines, *HELP, "", *keys.describe(PredictKeys)])


def read_keys(overrides: Sequence[str]) -> PredictKeys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(PredictKeys, overrides)
    require(options.out is not None or not options.cam, "cam=true needs a folder to write to: add out=FOLDER")
    require(options.step is None or options.window is not None, "step needs the length of a window: add window=SECONDS")
    require(
        options.out is None or options.window is None,
        "out draws the classes of whole videos: leave out window=, or write windows by format=csv",
    )
    if options.window is not None and options.clips is None:
        options.clips = 1
    return options


@dataclass(frozen=True)
class Prediction:
    """The top classes of a video or of a part of it; if it cannot be read, the reason."""

    path: str
    span: Span  # seconds; WHOLE for the whole video
    classes: TopClasses
    reason: str | None = None


def run(options: PredictKeys, videos: dict[str, str], overrides: Sequence[str]) -> None:
    """Score the videos, print the results and draw them. Exits with 1 if a video cannot be read or written."""
    trained = load_trained(options.ckpt, overrides, PredictKeys)
    predictor = build_predictor(options, trained, read_class_names(options.classes, trained))
    if options.cam:
        predictor.check_heat_maps()
    targets = choose_output_paths(videos, Path(options.out)) if options.out is not None else {}
    predictions = predict(predictor, list(videos), options)
    for number, prediction in enumerate(predictions):
        if prediction.path in targets and prediction.reason is None:
            reason = draw_prediction(predictor, prediction, targets[prediction.path], options.cam)
            predictions[number] = replace(prediction, reason=reason)
    print_predictions(options, predictions)
    failed = {prediction.path: prediction.reason for prediction in reversed(predictions) if prediction.reason}
    for path in [path for path in videos if path in failed]:
        print(f"error: {path}: {failed[path]}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def predict(predictor: Predictor, paths: Sequence[str], options: PredictKeys) -> list[Prediction]:
    """Predict each video or, with `options.window`, each of its windows, in the order of the paths and of time."""
    windows: dict[str, list[Span]] = {path: [WHOLE] for path in paths}
    unreadable: dict[str, str] = {}
    if options.window is not None:
        windows, unreadable = find_windows(predictor, paths, options.window, options.step or options.window)
    parts = [(path, span) for path in windows for span in windows[path]]
    predictions = [Prediction(path, WHOLE, [], reason) for path, reason in unreadable.items()]
    if parts:
        result = predictor.score_videos([path for path, _ in parts], [span for _, span in parts])
        reasons = {failure.index: failure.reason for failure in result.failures}
        for number, ((path, span), scores) in enumerate(zip(parts, result.scores, strict=True)):
            classes = [] if number in reasons else top_classes(predictor, scores, options.top)
            predictions.append(Prediction(path, span, classes, reasons.get(number)))
    order = {path: number for number, path in enumerate(paths)}
    return sorted(predictions, key=lambda prediction: order[prediction.path])  # stable


def top_classes(predictor: Predictor, scores: Tensor, count: int) -> TopClasses:
    """Return the `count` classes with the highest scores."""
    best = scores.topk(min(count, len(scores)))
    return [
        (label, predictor.names[label], score)
        for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw_prediction(predictor: Predictor, prediction: Prediction, target: Path, cam: bool) -> str | None:
    """Write a copy of one video with its top classes and, with `cam`, the heat maps of the first.

    Returns:
        The reason if that fails, else None.
    """
    path, classes = prediction.path, prediction.classes
    try:
        heat = predictor.heat_maps(path, classes[0][0]) if cam else None
        annotate_video(path, target, [f"{score:.2f} {name}" for _, name, score in classes], heat)
    except DecodeError as error:
        return error.reason
    except OSError as error:
        return f"cannot be written to {target}: {error.strerror or error}"
    except av.FFmpegError as error:  # not an OSError, so not about a file
        return f"cannot be encoded as H.264: {error.strerror or error}"
    print(f"{path} → {target}", file=sys.stderr)
    return None


def print_predictions(options: PredictKeys, predictions: Sequence[Prediction]) -> None:
    """Print the top classes of each video or window, or why it failed."""
    if options.format == "json":
        print(json.dumps([_as_json(prediction) for prediction in predictions], indent=1, ensure_ascii=False))
    elif options.format == "csv":
        _print_csv(predictions, options.window is not None)
    else:
        _print_table(predictions, options.window is not None)


def _as_json(prediction: Prediction) -> dict[str, Any]:
    entry: dict[str, Any] = {"video": prediction.path}
    if prediction.span != WHOLE:
        entry |= {"start": round(prediction.span[0], 3), "end": round(prediction.span[1], 3)}
    if prediction.reason is not None:
        return {**entry, "error": prediction.reason}
    classes = [{"label": label, "class": name, "score": score} for label, name, score in prediction.classes]
    return {**entry, "classes": classes}


def _print_csv(predictions: Sequence[Prediction], has_windows: bool) -> None:
    """Print a line for each video or window. The cells of those that cannot be read are empty."""
    top = max((len(prediction.classes) for prediction in predictions), default=0)
    seconds = ("start", "end") if has_windows else ()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["video", *seconds, *(name for i in range(1, top + 1) for name in (f"class_{i}", f"score_{i}"))])
    for prediction in predictions:
        row = [prediction.path]
        if has_windows:
            row += ["", ""] if prediction.span == WHOLE else [f"{second:.3f}" for second in prediction.span]
        cells = [cell for _, name, score in prediction.classes for cell in (name, f"{score:.4f}")]
        writer.writerow([*row, *cells, *[""] * (2 * top - len(cells))])


def _print_table(predictions: Sequence[Prediction], has_windows: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("video", *(["seconds"] if has_windows else []), "class", "score"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    for prediction in predictions:
        seconds = "" if prediction.span == WHOLE else "–".join(f"{second:.2f}" for second in prediction.span)
        place = [prediction.path, *([seconds] if has_windows else [])]
        rows = [(name, f"{score:.4f}") for _, name, score in prediction.classes]
        for rank, row in enumerate(rows if prediction.reason is None else [(prediction.reason, "")]):
            table.add_row(*([""] * len(place) if rank else place), *row)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table if console.is_terminal else set_full_width(table))
