"""Charades: a training clip has the labels of the actions that it shows, a test clip all labels of its video."""

from __future__ import annotations

import math
import os

from mgvideo.errors import UserError
from mgvideo.storage.paths import join

from .decoders import Decoder
from .frame_lists import is_frame_list, read_frame_list
from .listing import keep_listing
from .lists import check_root, read_classes
from .sampling import Sampling
from .tables import is_header, read_lines, read_table
from .timed import Action, TimedDataset

CLASSES = 157
COLUMNS = ("id", "actions")  # columns of the official CSV that are read
FRAMES_FPS = 24.0  # frame rate of the official frame archive


@keep_listing
def charades(
    root: str,
    annotations: str,
    videos: str = "Charades_v1_480",
    classes_file: str = "Charades_v1_classes.txt",
    decoder: Decoder | None = None,
    flip: bool = True,
) -> TimedDataset:
    """Build a dataset from an official CSV (`Charades_v1_train.csv`) or a frame list, recognised by the header.

    The videos of a CSV are `root/videos/ID.mp4`. A frame list (PySlowFast's format) has a line for each frame,
    `original_vido_id video_id frame_id path labels`, and its videos are folders of images, `root/videos/ID/`.

    Raises:
        UserError: A file cannot be read or a line is wrong.
    """
    check_root(root)
    file = join(root, annotations)
    lines = read_lines(file)
    frames_fps = None
    if is_header(lines, COLUMNS):
        actions = _from_csv(file, lines)
        paths = [os.path.join(videos, f"{name}.mp4") for name in actions]
    elif is_frame_list(lines):
        actions = _from_frames(file, lines)
        paths, frames_fps = [os.path.join(videos, name) for name in actions], FRAMES_FPS
    else:
        raise UserError(f"{file}:1: expected the header of Charades_v1_train.csv or of a frame list")
    if not actions:
        raise UserError(f"{file}: no videos in the list")
    names = [line.partition(" ")[2] for line in read_classes(join(root, classes_file))]
    if names and len(names) != CLASSES:
        raise UserError(f"{join(root, classes_file)}: {len(names)} classes, not {CLASSES}")
    names = names or [f"c{label:03d}" for label in range(CLASSES)]
    sampling = Sampling(flip=flip, inverse_jitter=True)
    return TimedDataset(root, paths, list(actions.values()), names, decoder, sampling, frames_fps)


def _from_csv(file: str, lines: list[str]) -> dict[str, list[Action]]:
    """Parse the official CSV; returns video ID → actions. Raises UserError."""
    actions: dict[str, list[Action]] = {}
    for number, row in read_table(file, lines, COLUMNS, exact=COLUMNS):
        name, text = row.get("id", ""), row.get("actions", "")
        if not name or name in actions:
            raise UserError(f"{file}:{number}: expected the id of another video, found {name!r}")
        try:
            actions[name] = [_action(part) for part in text.split(";") if part.strip()]
        except ValueError:
            raise UserError(f"{file}:{number}: expected actions as 'c092 11.90 21.20;…', found {text[:80]!r}") from None
    return actions


def _action(text: str) -> Action:
    """Parse an action `c092 11.90 21.20`; raises ValueError."""
    name, start, end = text.split()
    action = Action(_label(name.removeprefix("c")), float(start), float(end))
    if not (math.isfinite(action.start) and math.isfinite(action.end)):
        raise ValueError(text)
    return action


def _from_frames(file: str, lines: list[str]) -> dict[str, list[Action]]:
    """Parse a frame list; returns video ID → actions. Raises UserError.

    Consecutive frames with the same label become one action.
    """
    actions: dict[str, list[Action]] = {}
    latest: dict[tuple[str, int], int] = {}  # (video, label) → index of its latest action
    for row in read_frame_list(file, lines, CLASSES):
        group, time = actions.setdefault(row.video, []), row.frame / FRAMES_FPS
        for label in row.labels:
            last = latest.get((row.video, label))
            if last is not None and time - group[last].end < 1.5 / FRAMES_FPS:
                group[last] = group[last]._replace(end=time)
            else:
                latest[row.video, label] = len(group)
                group.append(Action(label, time, time))
    return actions


def _label(text: str) -> int:
    """Parse a label; raises ValueError if it is not a class."""
    label = int(text)
    if not 0 <= label < CLASSES:
        raise ValueError(text)
    return label
