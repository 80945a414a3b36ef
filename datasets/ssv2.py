"""Something-Something V2: the official JSON annotations and WebM videos."""

from __future__ import annotations

import os
import re
from typing import Any

from mgvideo.errors import UserError
from mgvideo.storage.paths import join

from .class_names import index_classes, normalize_class_name, suggest_class
from .decoders import Decoder
from .listing import keep_listing
from .lists import check_root, note_repeats
from .sampling import Sampling
from .tables import read_json_object, read_records
from .video import VideoDataset, VideoEntry


@keep_listing
def ssv2(
    root: str,
    annotations: str,
    labels: str = "something-something-v2-labels.json",
    videos: str = "20bn-something-something-v2",
    segments: bool = True,
    decoder: Decoder | None = None,
) -> VideoDataset:
    """Build a dataset from an annotation file and the videos `root/videos/ID.webm`.

    Class names are the templates of the annotations without brackets. With `segments`, a clip of t frames has one frame
    of each of t equal segments of the video, else frames at the grid's stride. Clips are never flipped, because many
    labels have a direction.

    Raises:
        UserError: A file cannot be read, or an annotation or label is wrong.
    """
    check_root(root)
    labels_by_name = _read_labels(join(root, labels))
    names = sorted(labels_by_name, key=labels_by_name.__getitem__)
    file = join(root, annotations)
    entries = []
    for origin, item in read_records(file):
        if not isinstance(item, dict) or not isinstance(item.get("template"), str) or not _is_id(item.get("id")):
            raise UserError(f"{origin}: expected an id and a template, found {str(item)[:80]}")
        template = normalize_class_name(re.sub(r"[\[\]]", "", item["template"]))
        if template not in labels_by_name:
            raise UserError(f"{origin}: {template!r} is not a label of {labels}{suggest_class(template, names)}")
        entries.append(VideoEntry(os.path.join(videos, f"{item['id']}.webm"), labels_by_name[template]))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    notes = note_repeats(annotations, entries)
    return VideoDataset(root, entries, names, decoder, Sampling(flip=False, segments=segments), notes)


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip() != ""


def _read_labels(file: str) -> dict[str, int]:
    """Read class name → label from the official file; raises UserError."""
    numbers = read_json_object(file)
    names = {int(number): normalize_class_name(name) for name, number in numbers.items() if str(number).isdecimal()}
    if sorted(names) != list(range(len(numbers))):
        raise UserError(f"{file}: labels must be numbered from 0 to {len(numbers) - 1}")
    return index_classes([names[number] for number in sorted(names)], file)
