"""Something-Something V2: the official JSON files over webm videos."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from mgvideo.errors import UserError
from mgvideo.paths import join

from .decoders import Decoder
from .lists import check_root, read_lines
from .sampling import Sampling
from .video import Entry, VideoDataset


def ssv2(
    root: str,
    annotations: str,
    labels: str = "something-something-v2-labels.json",
    videos: str = "20bn-something-something-v2",
    decoder: Decoder | None = None,
) -> VideoDataset:
    """The videos `root/videos/ID.webm` of an annotation file; labels are its templates, without brackets.

    A clip has a frame of each of as many segments of the video as it has frames, and is never flipped: many labels
    have a direction. Raises UserError.
    """
    check_root(root)
    numbers = _read_json(join(root, labels), dict)
    places = {name: int(number) for name, number in numbers.items() if str(number).isdecimal()}
    names = sorted(places, key=places.__getitem__)
    if sorted(places.values()) != list(range(len(numbers))):
        raise UserError(f"{join(root, labels)}: labels must be numbered from 0 to {len(numbers) - 1}")
    file = join(root, annotations)
    entries = []
    for number, item in enumerate(_read_json(file, list), start=1):
        if not isinstance(item, dict) or not {"id", "template"} <= set(item) or not isinstance(item["template"], str):
            raise UserError(f"{file}: item {number}: expected an id and a template, found {str(item)[:80]}")
        template = re.sub(r"[\[\]]", "", item["template"])
        if template not in places:
            raise UserError(f"{file}: item {number}: {template!r} is not a label of {labels}")
        entries.append(Entry(os.path.join(videos, f"{item['id']}.webm"), places[template]))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    return VideoDataset(root, entries, names, decoder, Sampling(flip=False, segments=True))


def _read_json(file: str, kind: type) -> Any:
    try:
        content = json.loads("\n".join(read_lines(file)))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: is not JSON: {error.msg}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: expected a JSON {'object' if kind is dict else 'list'}")
    return content
