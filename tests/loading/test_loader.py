"""Batches that worker processes load, and workers that starve, hang or die."""

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
from training import KNOBS, ROOT, start_process, tiny_plan

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import motion
from mgvideo.datasets.video import VideoDataset
from mgvideo.errors import UserError
from mgvideo.loading.loader import Batch, ClipDataset, Loader, LoaderOptions, collate, explain_dead_worker
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample
from mgvideo.loading.sampler import ClipSampler

METHODS = ["fork", "forkserver", "spawn"]
METHODS_SLOW_SPAWN = [*METHODS[:2], pytest.param("spawn", marks=pytest.mark.slow)]


def collate_and_record_sharing(samples: Sequence[Sample]) -> Batch:
    """Collate into a batch whose failure's reason is whether its clips were in shared memory before they were sent."""
    batch = collate(samples)
    return batch._replace(failures=(DecodeFailure(0, "", str(batch.clips.is_shared())),))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_stacks_the_same_batch_in_shared_memory(motion_root: str, method: str) -> None:
    dataset = motion(motion_root, KNOBS, "train", PyAV())
    options = LoaderOptions(num_workers=0), LoaderOptions(num_workers=1, start_method=method)
    in_process, in_worker = (
        list(Loader(dataset, o, collate=collate_and_record_sharing).load_steps(requests, range(2))) for o in options
    )
    assert [batch.clips.shape[0] for batch in in_process] == [3, 9], "a view's crops are separate clips"
    for expected, actual in zip(in_process, in_worker, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected[:3], actual[:3], strict=True))
        assert (expected.failures[0].reason, actual.failures[0].reason) == ("False", "True")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_carries_its_shard_and_seeds(motion_root: str, method: str) -> None:
    sampler = ClipSampler(tiny_plan("baseline"), KNOBS.train, seed=0)
    requests = partial(sampler.shard, rank=1, world_size=2)
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=2, start_method=method))
    batches = list(loader.load_steps(requests, range(3)))
    for step, batch in enumerate(batches):
        clips, shard = requests(step)
        assert batch.shard == shard
        assert batch.seeds is not None
        assert batch.seeds.tolist() == [clip.seed for clip in clips]
        assert batch.indices.tolist() == [clip.index for clip in clips]


def test_clips_of_a_repeated_video_are_loaded_together_and_the_same_on_another_number_of_ranks(
    motion_root: str,
) -> None:
    dataset, opened = motion(motion_root, KNOBS, "train", PyAV()), []
    sampler = ClipSampler(tiny_plan("baseline"), KNOBS.train, seed=0, repeat=2)
    loader = Loader(dataset, LoaderOptions(num_workers=0))
    whole = next(loader.load_steps(sampler.shard, range(1)))
    dataset.path = lambda index: opened.append(index) or VideoDataset.path(dataset, index)  # type: ignore
    parts = [next(loader.load_steps(partial(sampler.shard, rank=rank, world_size=8), range(1))) for rank in range(8)]
    assert len(opened) == 8
    assert torch.equal(torch.cat([part.clips for part in parts]), whole.clips), "each rank has one of two clips"
    opened.clear()
    next(loader.load_steps(sampler.shard, range(1)))
    assert opened == whole.indices[::2].tolist(), "a video is opened once"


@pytest.mark.filterwarnings("ignore")  # torch warns if there is no GPU to pin memory for
def test_later_phases_start_their_workers_on_this_ranks_device(
    motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = threading.local()  # as in CUDA, the current device of a new thread is 0
    devices.current = 3
    starts = []

    class RecordingDataLoader(DataLoader):
        def __iter__(self) -> Any:
            starts.append((threading.get_ident(), torch.cuda.current_device()))
            return super().__iter__()

    monkeypatch.setattr("torch.cuda.current_device", lambda: getattr(devices, "current", 0))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: setattr(devices, "current", device))
    monkeypatch.setattr("mgvideo.loading.loader.DataLoader", RecordingDataLoader)
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=1), pin_memory=True)
    assert len(list(loader.load_phases(requests, [range(2), range(2, 4), range(4, 5)]))) == 5
    assert [device for _, device in starts] == [3, 3, 3]
    assert len({thread for thread, _ in starts}) == 2, "the first phase starts in this thread, the others in another"


class SlowAtLowPriority:
    """A dataset whose clips take `seconds` in a low-priority process."""

    def __init__(self, dataset: ClipDataset, seconds: float) -> None:
        self.dataset, self.seconds = dataset, seconds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        if os.sched_getscheduler(0) == os.SCHED_IDLE:
            time.sleep(self.seconds)
        return self.dataset[request]


@pytest.mark.parametrize("seconds", [0, 0.1, 60])
def test_starved_workers_restart_at_normal_priority(
    motion_root: str, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("mgvideo.cpu.low_priority.STARVATION_TIMEOUT_S", 0.5 if seconds else 60.0)
    dataset = motion(motion_root, KNOBS, "train", PyAV())
    loader = Loader(SlowAtLowPriority(dataset, seconds), LoaderOptions(num_workers=1, low_priority=True))
    batches = []
    for batch in loader.load_steps(requests, range(8)):
        batches.append(batch)
        time.sleep(0.05)  # a training step
    assert loader.low_priority == (seconds == 0), "fast workers keep their low priority"
    expected = Loader(dataset, LoaderOptions(num_workers=0)).load_steps(requests, range(8))
    for batch, expected_batch in zip(batches, expected, strict=True):
        assert batch.clips.equal(expected_batch.clips)


@pytest.mark.parametrize(
    ("method", "fault", "timeout", "message"),
    [
        ("fork", "kill", 60, "a loader worker died"),
        ("forkserver", "kill", 60, "a loader worker died"),
        pytest.param("spawn", "kill", 60, "a loader worker died", marks=pytest.mark.slow),
        ("fork", "hang", 1, "a loader worker hangs"),
        ("forkserver", "hang", 1, "a loader worker hangs"),
    ],
)
def test_a_worker_that_dies_or_hangs_ends_loading_with_one_line(
    motion_root: str, tmp_path: Path, method: str, fault: str, timeout: float, message: str
) -> None:
    # In a separate process, because torch's signal handler raises in it for every worker that dies.
    _, text = run_in_process(tmp_path, print_worker_error, motion_root, method, fault, timeout)
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert message in lines[0]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("method", METHODS_SLOW_SPAWN)
def test_workers_exit_when_the_training_process_is_killed(motion_root: str, tmp_path: Path, method: str) -> None:
    code, text = run_in_process(tmp_path, print_workers_and_die, motion_root, method)
    assert code == -signal.SIGKILL, text
    workers = [int(pid) for pid in text.split()]
    assert len(workers) == 2
    while any(map(is_running, workers)):
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_have_the_module_path_of_this_process(motion_root: str, tmp_path: Path) -> None:
    (tmp_path / "mgvideo").mkdir()  # in the folder that the program starts in, but not on its path
    (tmp_path / "mgvideo/__init__.py").touch()
    program = tmp_path / "tools/program.py"
    program.parent.mkdir()
    program.write_text(f"from test_loader import *\nif __name__ == '__main__': print(count_batches({motion_root!r}))\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests/loading:{ROOT}/tests"}
    command = [sys.executable, str(program)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "3\n", result.stderr


def count_batches(motion_root: str) -> int:
    """Return how many batches a worker of the fork server loads."""
    loader = Loader(motion(motion_root, KNOBS, "train", PyAV()), LoaderOptions(num_workers=1))
    return len(list(loader.load_steps(requests, range(3))))


def run_in_process(folder: Path, function: Callable, *arguments: object) -> tuple[int | None, str]:
    """Call a function of this file in a new process. Return the exit code and the output."""
    process = start_process(function, *arguments, log=folder / "log")
    process.join()
    return process.exitcode, (folder / "log").read_text()


def print_workers_and_die(motion_root: str, method: str) -> None:
    """Print the PIDs of workers that have batches ready, then kill this process."""
    options = LoaderOptions(num_workers=2, start_method=method)
    batches = Loader(motion(motion_root, KNOBS, "train", PyAV()), options).load_steps(requests, range(10))
    next(batches)
    print(*(child.pid for child in active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def print_worker_error(motion_root: str, method: str, fault: str, timeout: float) -> None:
    """Print the error of a loader whose only worker dies or hangs."""
    dataset = motion(motion_root, KNOBS, "train", PyAV())
    if method == "forkserver":  # start the server first, which may take longer than the timeout
        load_all(Loader(dataset, LoaderOptions(1, start_method=method)).load_steps(requests, range(1)))
    faulty_dataset = Faulty(dataset, fault, rank=0, after=7, once=None, required_file=None)
    options = LoaderOptions(1, start_method=method, timeout=timeout)
    try:
        load_all(Loader(faulty_dataset, options).load_steps(requests, range(10)))
    except UserError as error:
        print(error)


def load_all(batches: Iterator[Batch]) -> None:
    """Load all batches. Explain a dead worker as the run program does."""
    try:
        for _ in batches:
            pass
    except RuntimeError as error:  # torch raises it from a signal handler, wherever this process is
        raise explain_dead_worker(error) from None
