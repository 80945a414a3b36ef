"""Batches made in worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import Faulty, requests
from torch.utils.data import DataLoader
from training import KNOBS, start_process, tiny_plan

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import motion
from mgvideo.errors import UserError
from mgvideo.loading.loader import Batch, ClipDataset, Loader, LoaderOptions, collate, explain_dead_worker
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample
from mgvideo.loading.sampler import ClipSampler

METHODS = ["fork", "forkserver", "spawn"]
SLOW_SPAWN = [*METHODS[:2], pytest.param("spawn", marks=pytest.mark.slow)]


def telling(samples: Sequence[Sample]) -> Batch:
    """A batch whose failures say whether its clips were in shared memory before they were sent."""
    batch = collate(samples)
    return batch._replace(failures=(DecodeFailure(0, "", str(batch.clips.is_shared())),))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_stacks_the_same_batch_in_shared_memory(motion_root: str, method: str) -> None:
    dataset = motion(motion_root, KNOBS, "train", PyAV())
    here = list(Loader(dataset, LoaderOptions(num_workers=0), collate=telling).open(requests, range(2)))
    there = list(
        Loader(dataset, LoaderOptions(num_workers=1, start_method=method), collate=telling).open(requests, range(2))
    )
    assert [batch.clips.shape[0] for batch in here] == [3, 9], "a view's crops are clips of their own"
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert (a.failures[0].reason, b.failures[0].reason) == ("False", "True")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_carries_its_shard(motion_root: str, method: str) -> None:
    sampler = ClipSampler(tiny_plan("baseline"), KNOBS.train, seed=0)
    requests = partial(sampler.shard, rank=1, world=2)
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=2, start_method=method))
    batches = list(loader.open(requests, range(3)))
    for step, batch in enumerate(batches):
        clips, shard = requests(step)
        assert batch.shard == shard
        assert batch.indices.tolist() == [clip.index for clip in clips]


@pytest.mark.filterwarnings("ignore")  # there may be no GPU to pin memory for
def test_later_phases_start_their_workers_on_this_ranks_device(
    motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = threading.local()  # as CUDA keeps it: a new thread's current device is 0
    devices.current = 3
    starts = []

    class Recording(DataLoader):
        def __iter__(self) -> Any:
            starts.append((threading.get_ident(), torch.cuda.current_device()))
            return super().__iter__()

    monkeypatch.setattr("torch.cuda.current_device", lambda: getattr(devices, "current", 0))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: setattr(devices, "current", device))
    monkeypatch.setattr("mgvideo.loading.loader.DataLoader", Recording)
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=1), pin=True)
    assert len(list(loader.phases(requests, [range(2), range(2, 4), range(4, 5)]))) == 5
    assert [device for _, device in starts] == [3, 3, 3]
    assert len({thread for thread, _ in starts}) == 2, "the first phase starts in this thread, the others beside it"


class Starving:
    """Clips that take `seconds` in a process that only idle cores run."""

    def __init__(self, dataset: ClipDataset, seconds: float) -> None:
        self.dataset, self.seconds = dataset, seconds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        if os.sched_getscheduler(0) == os.SCHED_IDLE:
            time.sleep(self.seconds)
        return self.dataset[request]


@pytest.mark.parametrize("seconds", [0, 0.1, 60])
def test_workers_that_are_starved_are_replaced(
    motion_root: str, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("mgvideo.loading.loader.PATIENCE", 0.5 if seconds else 60.0)
    plain = motion(motion_root, KNOBS, "train", PyAV())
    loader = Loader(Starving(plain, seconds), LoaderOptions(num_workers=1, low_priority=True))
    got = []
    for batch in loader.open(requests, range(8)):
        got.append(batch)
        time.sleep(0.05)  # a step
    assert loader.low_priority == (seconds == 0), "those that are quick enough stay"
    for a, b in zip(got, Loader(plain, LoaderOptions(num_workers=0)).open(requests, range(8)), strict=True):
        assert a.clips.equal(b.clips)


@pytest.mark.parametrize(
    ("method", "fault", "timeout", "said"),
    [
        ("fork", "kill", 60, "a loader worker died"),
        ("forkserver", "kill", 60, "a loader worker died"),
        pytest.param("spawn", "kill", 60, "a loader worker died", marks=pytest.mark.slow),
        ("fork", "hang", 1, "a loader worker hangs"),
        ("forkserver", "hang", 1, "a loader worker hangs"),
    ],
)
def test_a_worker_that_dies_or_hangs_ends_the_reading_with_one_line(
    motion_root: str, tmp_path: Path, method: str, fault: str, timeout: float, said: str
) -> None:
    # in a process of its own: torch's handler raises again, wherever that process is, for every worker that dies
    _, text = in_a_process(tmp_path, last_words, motion_root, method, fault, timeout)
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert said in lines[0]


@pytest.mark.parametrize("method", SLOW_SPAWN)
def test_workers_end_with_a_training_process_that_is_killed(motion_root: str, tmp_path: Path, method: str) -> None:
    code, text = in_a_process(tmp_path, die_reading, motion_root, method)
    assert code == -signal.SIGKILL, text
    workers = [int(pid) for pid in text.split()]
    assert len(workers) == 2
    while [pid for pid in workers if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        time.sleep(0.1)


def test_workers_find_modules_where_this_process_does(motion_root: str, tmp_path: Path) -> None:
    (tmp_path / "mgvideo").mkdir()  # in the folder that it starts in, but not on its path
    (tmp_path / "mgvideo/__init__.py").touch()
    program = tmp_path / "tools/program.py"
    program.parent.mkdir()
    program.write_text(f"from test_loader import *\nif __name__ == '__main__': print(batches_read({motion_root!r}))\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(program)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "3\n", result.stderr


def batches_read(motion_root: str) -> int:
    """How many batches a server's worker gives."""
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=1))
    return len(list(loader.open(requests, range(3))))


def in_a_process(folder: Path, function: Callable, *arguments: object) -> tuple[int | None, str]:
    """The exit code, and what it says, of a process that calls a function of this file."""
    process = start_process(function, *arguments, log=folder / "log")
    process.join()
    return process.exitcode, (folder / "log").read_text()


def die_reading(motion_root: str, method: str) -> None:
    """Names its workers, which have batches ready, and is killed."""
    options = LoaderOptions(num_workers=2, start_method=method)
    batches = Loader(motion(motion_root, KNOBS, "train", PyAV()), options).open(requests, range(10))
    next(batches)
    print(*(child.pid for child in active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def last_words(motion_root: str, method: str, fault: str, timeout: float) -> None:
    """Prints what a reading says whose only worker dies or hangs."""
    plain = motion(motion_root, KNOBS, "train", PyAV())
    if method == "forkserver":  # has time to start its server
        read(Loader(plain, LoaderOptions(1, start_method=method)).open(requests, range(1)))
    dataset = Faulty(plain, fault, rank=0, after=7, once=None, required_file=None)
    options = LoaderOptions(1, start_method=method, timeout=timeout)
    try:
        read(Loader(dataset, options).open(requests, range(10)))
    except UserError as error:
        print(error)


def read(batches: Iterator[Batch]) -> None:
    try:
        for _ in batches:
            pass
    except RuntimeError as error:  # torch tells of a death wherever this process is, as the run program does
        raise explain_dead_worker(error) from None
