"""The clips of each step: passes over the dataset, ranks, and the permutation of videos."""

import pickle
from collections import Counter

import numpy as np
import pytest

from mgvideo.loading import sampler
from mgvideo.loading.requests import ClipRequest
from mgvideo.loading.sampler import ClassOrder, ClipSampler, shuffled_videos
from mgvideo.plan import schedules
from mgvideo.plan.plan import Base, Plan

BASE = Base(
    batch_size=16, num_frames=16, crop_size=64, frame_stride=2, short_side=(72, 84), epochs=10, lr=0.1,
    lr_milestones=(6, 9), gamma=0.1, warmup_epochs=0.5, warmup_lr=0.01,
)  # fmt: skip
SIZE = 100  # no batch size divides it, so passes over the dataset end inside batches
SCHEDULES = ("baseline", "short", "long", "multigrid")


def make_test_plan(name: str = "multigrid") -> Plan:
    return getattr(schedules, name)(BASE, SIZE, epoch_factor=1.5, round_epochs=False)


def clips(step: int, seed: int = 3, rank: int = 0, world_size: int = 1) -> list[ClipRequest]:
    return list(ClipSampler(make_test_plan(), SIZE, seed).shard(step, rank, world_size).clips)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_pass_has_every_video_once(name: str) -> None:
    plan = make_test_plan(name)
    sampler = ClipSampler(plan, SIZE, seed=3)
    indices = [clip.index for step in range(plan.steps) for clip in sampler.shard(step).clips]
    assert len(indices) == sum(plan.slot(step).batch for step in range(plan.steps))
    passes = [indices[i : i + SIZE] for i in range(0, len(indices) - SIZE + 1, SIZE)]
    assert len(passes) > 3
    assert all(sorted(videos) == list(range(SIZE)) for videos in passes)
    assert passes[0] != passes[1]


def test_a_batch_depends_only_on_its_step() -> None:
    steps = make_test_plan().steps
    forward = [clips(step) for step in range(steps)]
    assert [clips(step) for step in reversed(range(steps))] == forward[::-1]
    assert clips(0, seed=4) != forward[0]
    seeds = [clip.seed for batch in forward for clip in batch]
    assert len(set(seeds)) == len(seeds)


def test_requests_have_the_grid_of_their_slot() -> None:
    plan = make_test_plan()
    for step in range(plan.steps):
        assert {clip.grid for clip in clips(step)} == {plan.slot(step).grid}


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_all_ranks_are_the_batch_of_a_single_rank(world_size: int) -> None:
    for step in range(make_test_plan().steps):
        shards = [clips(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [clip for shard in shards for clip in shard] == clips(step)


def test_cost_of_a_shard_does_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    num_words = 0

    def count_words(*arguments: object) -> np.ndarray:
        nonlocal num_words
        words = random_words(*arguments)  # type: ignore[arg-type]
        num_words += words.size
        return words

    random_words = sampler.random_words
    monkeypatch.setattr(sampler, "random_words", count_words)
    costs = []
    for world_size in (8, 128, 1024):
        base = Base(**{**vars(BASE), "batch_size": 8 * world_size, "short_side": (64, 72)})
        plan = schedules.long(base, 240_000, round_epochs=False)
        num_words = 0
        shard = ClipSampler(plan, 240_000, 0).shard(1, world_size - 1, world_size)
        assert len(shard.clips) == 8 * plan.slot(1).batch // base.batch_size
        costs.append(num_words)
    assert max(costs) < 1.1 * min(costs), "a small difference is allowed: some cells are permuted more than once"


def test_the_clips_of_a_seed_are_the_same_in_every_version() -> None:
    assert [(clip.index, clip.seed) for clip in clips(1)[:3]] == GOLDEN


GOLDEN = [(70, 10759715331983151025), (97, 17839690608787395266), (67, 4905637666422160292)]


def test_a_sampler_can_be_pickled() -> None:
    sampler = ClipSampler(make_test_plan(), SIZE, 3)
    assert pickle.loads(pickle.dumps(sampler.shard))(5) == sampler.shard(5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 64, 100, 7985])
def test_every_pass_is_a_permutation(size: int) -> None:
    videos = shuffled_videos(np.arange(3 * size, dtype=np.uint64), size, seed=5)
    assert (np.sort(videos.reshape(3, size)) == np.arange(size)).all()


@pytest.mark.parametrize("size", [4, 5])
def test_all_orders_of_a_few_videos_are_equally_frequent(size: int) -> None:
    orders = {4: 24, 5: 120}[size]
    videos = shuffled_videos(np.arange(200 * orders * size, dtype=np.uint64), size, seed=0).reshape(-1, size)
    counts = np.array([*Counter(map(bytes, videos)).values()])
    assert len(counts) == orders
    # chi-square statistic: its mean is orders - 1, its standard deviation √(2 (orders - 1))
    assert abs(((counts - 200) ** 2 / 200).sum() - (orders - 1)) < 4 * (2 * (orders - 1)) ** 0.5


def test_orders_of_many_videos_are_uncorrelated() -> None:
    size = 20_000
    first, second = shuffled_videos(np.arange(2 * size, dtype=np.uint64), size, seed=1).reshape(2, size)
    (seed_2,) = shuffled_videos(np.arange(size, dtype=np.uint64), size, seed=2).reshape(1, size)
    for a, b in ((first, np.arange(size)), (first, second), (first, seed_2), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 4 / size**0.5


def test_repeated_clips_of_a_video_are_neighbours_with_their_own_seeds() -> None:
    base = Base(**{**vars(BASE), "batch_size": 12})
    plan = schedules.multigrid(base, 3 * SIZE, epoch_factor=1.5, round_epochs=False)
    sampler = ClipSampler(plan, SIZE, seed=3, repeat=3)
    sequence = [clip for step in range(plan.steps) for clip in sampler.shard(step).clips]
    groups = [sequence[i : i + 3] for i in range(0, len(sequence), 3)]
    for group in groups:
        assert len({clip.index for clip in group}) == 1
        assert {clip.repeats for clip in group} == {tuple(clip.seed for clip in group)}
        assert len({clip.seed for clip in group}) == 3
    videos = [group[0].index for group in groups]
    assert sorted(videos[:SIZE]) == list(range(SIZE)), "a pass has every video once"
    parts = [clip for rank in range(4) for clip in sampler.shard(0, rank, 4).clips]
    assert parts == list(sampler.shard(0).clips)


LABELS = np.array([0] * 60 + [3] * 30 + [5] * 7 + [6] * 3)  # classes 1, 2 and 4 have no videos


def balanced_sampler(seed: int = 3) -> ClipSampler:
    return ClipSampler(make_test_plan(), SIZE, seed, classes=ClassOrder.of_labels(LABELS))


def test_a_balanced_sampler_shows_every_class_equally_often_and_all_videos_of_a_class() -> None:
    plan, sampler = make_test_plan(), balanced_sampler()
    indices = [clip.index for step in range(plan.steps) for clip in sampler.shard(step).clips]
    classes = LABELS[indices]
    for start in range(0, len(classes) - 4, 4):
        assert sorted(classes[start : start + 4]) == [0, 3, 5, 6]
    for label in (0, 3, 5, 6):
        videos = [index for index in indices if LABELS[index] == label]
        size = (label == LABELS).sum()
        passes = [videos[i : i + size] for i in range(0, len(videos) - size + 1, size)]
        assert len(passes) > 2
        assert all(sorted(part) == np.flatnonzero(label == LABELS).tolist() for part in passes)
        assert len({tuple(part) for part in passes}) > 1, "each pass has its own order"


def test_a_balanced_batch_depends_only_on_its_step_and_not_on_ranks() -> None:
    sampler = balanced_sampler()
    for step in (5, 0, make_test_plan().steps - 1):
        whole = list(sampler.shard(step).clips)
        assert [clip for rank in range(4) for clip in sampler.shard(step, rank, 4).clips] == whole
        assert list(pickle.loads(pickle.dumps(sampler)).shard(step).clips) == whole
    assert list(balanced_sampler(seed=4).shard(0).clips) != list(sampler.shard(0).clips)
