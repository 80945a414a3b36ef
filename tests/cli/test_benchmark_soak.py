"""`mgvideo benchmark soak`: reports flat usage of the real loader, and growth of a dataset that leaks."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.benchmark.soak import mixed_requests, read_keys, run, soak, usage_growth
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.lists import video_list
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.plan.plan import Grid

GRIDS = [Grid(2, 16, (1, 3), (20, 24)), Grid(4, 24, (1, 3), (28, 40))]


class LeakyDataset:
    """A dataset that leaks an open file and 4 MiB for each clip."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.leaked = dataset, []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: Any) -> Any:
        self.leaked.append((open(os.devnull), os.urandom(4 << 20)))  # noqa: SIM115
        return self.dataset[request]


def test_usage_of_the_real_loader_is_flat_and_written_to_a_file(tmp_path: Path, motion_root: str, capsys: Any) -> None:
    overrides = ["clips=64", "every=8", "growth=1", f"out={tmp_path}/soak.json"]
    run(read_keys(overrides), app.compose_config("run", [*TINY, f"dataset.root={motion_root}", "decoder=pyav"]))
    usages = json.loads((tmp_path / "soak.json").read_text())
    assert 6 <= len(usages) <= 8, "workers may exit before the last measurements"
    assert all(usage["memory"] > 1 and usage["files"] > 1 for usage in usages)
    assert capsys.readouterr().out.rstrip().endswith(": flat")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_leak_is_measured(motion_root: str, workers: int) -> None:
    folder = next(Path(motion_root).glob("*/train.csv")).parent
    dataset = LeakyDataset(video_list(str(folder), "train.csv", decoder=PyAV()))
    loader = Loader(dataset, LoaderOptions(num_workers=workers))
    options = read_keys(["clips=96", "every=8"])
    usages = list(soak(loader, partial(mixed_requests, GRIDS, len(dataset), options.batch), options))
    memory, files = usage_growth(usages)
    assert memory > options.growth
    assert files > 20


@pytest.mark.parametrize("argument", ["clips=0", "batch=0", "every=9000", "growth=-1"])
def test_invalid_arguments_raise(argument: str) -> None:
    with pytest.raises(UserError, match=argument):
        read_keys([argument])
