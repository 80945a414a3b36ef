"""`mgvideo predict`: the top classes of videos, as a table, as JSON, or drawn into copies of the videos."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mgvideo.datasets.decoders import DecodeError
from mgvideo.plan.plan import require

from . import app, keys
from .overlay import annotate_video, choose_output_paths
from .predictor import Predictor, ViewKeys, build_predictor, find_videos, is_video
from .schema import key
from .trained import HELP, load_trained


@dataclass
class PredictKeys(ViewKeys):
    """Keys of this program, besides the videos and the keys of a run."""

    top: int = key(5, "classes to print for each video", least=1)
    classes: str | None = key(
        None, "file of class names, one per line; null: those of the run, else of its dataset, else numbers"
    )
    format: str = key("table", "table or json", choices=("table", "json"))
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
    return options


def run(options: PredictKeys, videos: dict[str, str], overrides: Sequence[str]) -> None:
    """Score the videos, print the results and draw them. Exits with 1 if a video cannot be read or written."""
    predictor = build_predictor(options, load_trained(options.ckpt, overrides, PredictKeys), options.classes)
    targets = choose_output_paths(videos, Path(options.out)) if options.out is not None else {}
    paths = list(videos)
    result = predictor.score_videos(paths)
    reasons = {paths[failure.index]: failure.reason for failure in result.failures}
    rows = {path: _top(predictor, scores, options.top) for path, scores in zip(paths, result.scores, strict=True)}
    for path in [path for path in targets if path not in reasons]:
        reasons |= draw_predictions(predictor, path, targets[path], rows[path], options.cam)
    print_predictions(options, rows, reasons)
    for path, reason in reasons.items():
        print(f"error: {path}: {reason}", file=sys.stderr)
    if reasons:
        raise SystemExit(1)


TopClasses = list[tuple[int, str, float]]  # (label, name, score), highest score first


def _top(predictor: Predictor, scores: Tensor, count: int) -> TopClasses:
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
