"""Files as people have them: every frame that a person sees, in that order, from each decoder, read in any order.

`data/field/frames.json` holds the numbers that the frames of each file show, as the ffmpeg program decodes them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mgvideo.datasets.decoders import Decoder, Decord, PyAV, TorchCodec
from mgvideo.datasets.videofile import Box

FOLDER = Path(__file__).parents[1] / "data" / "field"
FRAMES: dict[str, list[int]] = json.loads((FOLDER / "frames.json").read_text())
DECODERS = {"pyav": PyAV, "decord": Decord, "torchcodec": TorchCodec}
BITS = 12


def shown(frame: Tensor) -> int:
    """The number that a frame `[h, w, 3]` shows: twelve columns, dark for 0 and bright for 1, the lowest bit left."""
    picture = frame.numpy().astype(float).mean((0, 2))
    middles = ((np.arange(BITS) + 0.5) * len(picture) / BITS).astype(int)
    return int(sum(1 << bit for bit, x in enumerate(middles) if picture[x] > 128))


def read(decoder: Decoder, name: str, *requests: list[int]) -> list[list[int]]:
    """The numbers of the frames of each request, all through one open file."""
    with decoder.open(str(FOLDER / name)) as video:
        assert video.frames == len(FRAMES[name])
        box = Box(0, 0, video.height, video.width)
        return [[shown(frame) for frame in video.read(np.array(request), box)] for request in requests]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_is_the_one_that_people_see(name: str, decoder: str) -> None:
    expected, open_with = FRAMES[name], DECODERS[decoder]()
    order = list(range(len(expected)))
    (through,) = read(open_with, name, order)
    assert through == expected
    random.Random(0).shuffle(order)
    singly = read(open_with, name, *([index] for index in order))
    assert [number for (number,) in singly] == [expected[index] for index in order]
    clips = [list(range(start, start + 16, 2)) for start in range(0, len(expected) - 16, 7)]
    assert read(open_with, name, *clips) == [[expected[index] for index in clip] for clip in clips]
