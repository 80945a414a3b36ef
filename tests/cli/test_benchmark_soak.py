"""`mgvideo benchmark soak`: flat where nothing leaks, and not where something does."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.benchmark.soak import grown, mixed_requests, read_keys, run, soak
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.lists import video_list
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.plan.plan import Grid

GRIDS = [Grid(2, 16, (1, 3), (20, 24)), Grid(4, 24, (1, 3), (28, 40))]


class Leaky:
    """A dataset that opens a file and keeps memory for each clip."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.kept = dataset, []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: Any) -> Any:
        self.kept.append((open(os.devnull), os.urandom(4 << 20)))  # noqa: SIM115
        return self.dataset[request]


def test_the_real_loader_is_looked_at_and_written_down(tmp_path: Path, motion_root: str, capsys: Any) -> None:
    own = ["clips=64", "every=8", "growth=1", f"out={tmp_path}/soak.json"]
    run(read_keys(own), app.compose_config("run", [*TINY, f"dataset.root={motion_root}", "decoder=pyav"]))
    looks = json.loads((tmp_path / "soak.json").read_text())
    assert 6 <= len(looks) <= 8, "the workers may be gone before the last batches are looked at"
    assert all(look["memory"] > 1 and look["files"] > 1 for look in looks)
    assert capsys.readouterr().out.rstrip().endswith(": flat")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_leak_shows(motion_root: str, workers: int) -> None:
    folder = next(Path(motion_root).glob("*/train.csv")).parent
    dataset = Leaky(video_list(str(folder), "train.csv", decoder=PyAV()))
    loader = Loader(dataset, LoaderOptions(num_workers=workers))
    given = read_keys(["clips=96", "every=8"])
    looks = list(soak(loader, partial(mixed_requests, GRIDS, len(dataset), given.batch), given))
    memory, files = grown(looks)
    assert memory > given.growth
    assert files > 20


@pytest.mark.parametrize("argument", ["clips=0", "batch=0", "every=9000", "growth=-1"])
def test_senseless_arguments_are_refused(argument: str) -> None:
    with pytest.raises(UserError, match=argument):
        read_keys([argument])
