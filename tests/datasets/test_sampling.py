"""Test sampling: draws cover their ranges and follow the published recipes."""

from __future__ import annotations

import numpy as np
import pytest

from mgvideo.datasets.sampling import ClipDraw, Sampling, clip_indices, crop_boxes, draw_clip, frame_span
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

GRID = Grid(frames=8, size=112, strides=(2, 8), scales=(128, 160))


PLAIN = Sampling()


def draws(sampling: Sampling = PLAIN) -> list[ClipDraw]:
    return [draw_clip(ClipRequest(0, GRID, seed), sampling) for seed in range(2000)]


def indices(request: ClipRequest, first: int, stop: int, sampling: Sampling = PLAIN) -> list[int]:
    return clip_indices(request, draw_clip(request, sampling), sampling, first, stop).tolist()


def test_draws_cover_their_ranges() -> None:
    clip_draws = draws()
    assert {draw.stride for draw in clip_draws} == set(range(2, 9))
    assert {draw.short_side for draw in clip_draws} == set(range(128, 161))
    assert 0.45 < np.mean([draw.flip for draw in clip_draws]) < 0.55
    clips = [indices(ClipRequest(0, GRID, seed), 0, 62) for seed in range(2000) if clip_draws[seed].stride == 8]
    starts = {clip[0] for clip in clips}
    assert starts == set(range(6)), "57 frames fit 62 in six ways"
    largest = [crop_boxes(ClipRequest(0, GRID, 0), draw, 129, 128)[0] for draw in clip_draws if draw.short_side == 128]
    assert {box[:2] for box in largest} <= {(top, left) for top in range(18) for left in range(17)}
    assert {box.top for box in largest} | {box.left for box in largest} == set(range(18))
    assert {box[2:] for box in largest} == {(112, 112)}


def test_inverse_jitter_prefers_small_sides() -> None:
    sides = np.array([draw.short_side for draw in draws(Sampling(inverse_jitter=True))])
    assert (sides.min(), sides.max()) == (128, 160)
    assert abs(np.mean(1 / sides) - (1 / 128 + 1 / 160) / 2) < 2e-5


def test_short_video_repeats_its_last_frame() -> None:
    request = ClipRequest(0, Grid(6, 112, (2, 2), (112, 112)), seed=5)
    assert indices(request, 0, 7) == [0, 2, 4, 6, 6, 6]
    assert indices(request, 0, 1) == [0] * 6
    assert indices(request, 10, 13) == [10, 12, 12, 12, 12, 12]


def test_views_are_spaced_over_the_video_and_the_longer_side() -> None:
    grid = Grid(4, 100, (2, 2), (100, 100))
    requests = [ClipRequest(0, grid, 9, View(clip, 3, 3)) for clip in range(3)]
    assert [indices(request, 0, 27)[0] for request in requests] == [0, 10, 20]
    draw = draw_clip(requests[0], PLAIN)
    assert not draw.flip
    assert crop_boxes(requests[0], draw, 100, 161) == [(0, left, 100, 100) for left in (0, 30, 61)]
    assert crop_boxes(requests[0], draw, 322, 200) == [(top, 0, 200, 200) for top in (0, 61, 122)]
    alone = ClipRequest(0, grid, 9, View(0, 1, 1))
    assert indices(alone, 0, 27)[0] == 10
    assert crop_boxes(alone, draw_clip(alone, PLAIN), 100, 160) == [(0, 30, 100, 100)]


@pytest.mark.parametrize(
    ("seconds", "span"),
    [((0, np.inf), (0, 100)), ((1, 2), (25, 50)), ((3.9, 9), (97, 100)), ((1, 1.001), (25, 26))],
)
def test_span_has_at_least_one_frame(seconds: tuple, span: tuple) -> None:
    assert frame_span(seconds, np.arange(101) / 25) == span


@pytest.mark.parametrize("fps", [24, 25, 30000 / 1001, 30, 240])
@pytest.mark.parametrize("digits", [3, 17])
def test_rounded_span_starts_with_its_frame(fps: float, digits: int) -> None:
    times = np.arange(3001) / fps
    clock = np.round(times, 3)  # as Matroska rounds them
    for first in range(0, 2999, 7):
        start, end = round(first / fps, digits), round((first + 5) / fps, digits)
        assert frame_span((start, end), times) == (first, min(first + 5, 3000)), first
        assert frame_span((start, end), clock) == (first, min(first + 5, 3000)), first


def test_span_starts_with_the_displayed_frame_and_excludes_its_end() -> None:
    times = np.array([0, 0.1, 0.2, 1.0, 1.025, 1.05, 1.075])  # the third frame is displayed longer
    assert frame_span((0.0, 0.2), times) == (0, 2)
    assert frame_span((0.15, 0.6), times) == (1, 3)
    assert frame_span((0.5, 0.9), times) == (2, 3)
    assert frame_span((0.5, 9), times) == (2, 6)
    assert frame_span((1.02, 1.021), times) == (3, 4)
    first, stop = frame_span((1.075, 2), times)
    assert first >= stop, "it begins after the video"


def test_crop_larger_than_the_short_side_is_refused() -> None:
    with pytest.raises(UserError, match="crop of 112 pixels does not fit a short side of 100"):
        draw_clip(ClipRequest(0, Grid(8, 112, (1, 1), (100, 128)), 0), PLAIN)


def test_segments_cover_the_video_for_every_grid() -> None:
    segments = Sampling(segments=True)
    grid = Grid(8, 112, (2, 8), (112, 112))
    clips = np.array([indices(ClipRequest(0, grid, seed), 5, 46, segments) for seed in range(500)])
    for place in range(8):
        assert set(clips[:, place]) == set(range(5 + 5 * place, 5 + 5 * place + 6)), "both ends of a segment count"
    assert indices(ClipRequest(0, grid, 0, View(0, 1, 3)), 5, 46, segments) == [7 + 5 * place for place in range(8)]
    assert indices(ClipRequest(0, grid, 0), 0, 1, segments) == [0] * 8
    assert max(indices(ClipRequest(0, grid, 3), 0, 3, segments)) <= 2


RELATIVE = Sampling(crop_area=(0.08, 1.0), crop_aspect=(0.75, 4 / 3))


def relative_boxes(height: int, width: int, sampling: Sampling = RELATIVE) -> np.ndarray:
    request = ClipRequest(0, GRID, 0)
    return np.array([crop_boxes(request, draw, height, width)[0] for draw in draws(sampling)])


@pytest.mark.parametrize(("height", "width"), [(300, 300), (360, 640), (640, 360), (200, 1000)])
def test_random_resized_crops_have_the_area_and_aspect_of_their_ranges(height: int, width: int) -> None:
    top, left, rows, columns = relative_boxes(height, width).T.astype(float)
    assert min(top.min(), left.min()) == 0
    assert ((top + rows).max(), (left + columns).max()) == (height, width)
    aspect, area = columns / rows, rows * columns / (height * width)
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    assert abs(np.log(aspect).mean()) < 0.02
    largest = np.minimum(np.minimum(aspect * height / width, width / height / aspect), 1)
    fraction = (area - np.minimum(0.08, largest)) / np.maximum(largest - 0.08, 1e-9)
    if largest.max() > 0.3:
        assert abs(np.quantile(fraction, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.04, "uniform in area"


def test_a_crop_is_read_from_frames_large_enough_for_it() -> None:
    for height, width in ((300, 300), (360, 640), (640, 360)):
        for draw in draws(RELATIVE):
            assert draw.crop is not None
            scale = draw.short_side / min(height, width)
            assert scale * min(draw.crop.size_in(height, width)) > GRID.size - 1e-6
    sides = [draw.short_side for draw in draws(RELATIVE)]
    assert min(sides) < 1.1 * GRID.size, "large crops are read from small frames"


def test_random_resized_crops_change_no_other_draw_and_no_test_view() -> None:
    for seed in range(50):
        plain, relative = (draw_clip(ClipRequest(0, GRID, seed), sampling) for sampling in (PLAIN, RELATIVE))
        assert (plain.stride, plain.start, plain.flip) == (relative.stride, relative.start, relative.flip)
    view = ClipRequest(0, Grid(4, 100, (2, 2), (100, 100)), 9, View(0, 1, 1))
    assert draw_clip(view, RELATIVE) == draw_clip(view, PLAIN)
