"""Space in /dev/shm for the batches of loader workers: the check before training, and workers that run out of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import KNOBS, ROOT, TINY

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import motion
from mgvideo.errors import UserError
from mgvideo.loading import shared_memory
from mgvideo.loading.loader import Loader, LoaderOptions, explain_dead_worker
from mgvideo.loading.requests import BatchRequest, ClipRequest, Sample
from mgvideo.loading.shared_memory import (
    GIB,
    BatchSizes,
    check_shared_memory_space,
    get_shared_memory_space,
    max_bytes_in_flight,
    min_bytes,
)
from mgvideo.plan.plan import Grid

MIB = 2**20


def test_bytes_in_flight_count_two_loaders_in_training_and_one_in_testing() -> None:
    assert max_bytes_in_flight([BatchSizes(10, 0)], workers=4, prefetch=2) == 10 * (8 + 8 + 1)
    assert max_bytes_in_flight([BatchSizes(10, 30)], workers=4, prefetch=2) == 30 * (8 + 1)
    assert max_bytes_in_flight([BatchSizes(10, 0), BatchSizes(7, 0)], workers=1, prefetch=1) == (10 + 7) * 3
    assert min_bytes([BatchSizes(10, 30), BatchSizes(7, 0)]) == 2 * (30 + 7)


def check(monkeypatch: pytest.MonkeyPatch, free: int | None, workers: int = 4, total: int = 0) -> list[str]:
    """Return the warnings for one rank with batches of 40 MiB. `free=None` means that the system sets no limit."""
    space = None if free is None else shared_memory.SharedMemorySpace("x", "node1", total or free, free)
    monkeypatch.setattr(shared_memory, "get_shared_memory_space", lambda folder: space)
    return check_shared_memory_space(BatchSizes(40 * MIB, 0), workers, prefetch=2)


def test_enough_space_has_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, 17 * 40 * MIB) == []
    assert check(monkeypatch, None) == []


def test_space_that_may_fill_up_has_a_warning_with_fitting_options(monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = check(monkeypatch, 17 * 40 * MIB - 1, total=3 * GIB)
    assert warning == (
        "/dev/shm on node1 has 680 MiB free, but loader workers may use up to 680 MiB, and a full /dev/shm ends the "
        "run: enlarge it (docker run --shm-size=4g), or set loader.num_workers=4 loader.prefetch_factor=1"
    )
    (warning,) = check(monkeypatch, 130 * MIB)
    assert warning.endswith("(docker run --shm-size=1g), or set loader.num_workers=1 loader.prefetch_factor=1")
    (warning,) = check(monkeypatch, 100 * MIB)
    assert warning.endswith("or set loader.num_workers=0, which is slow")


def test_space_for_less_than_two_batches_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"/dev/shm on node1 has 64 MiB free, but loader workers need at least 80 MiB and up to 680 MiB: "
    with pytest.raises(UserError, match=f"{message}enlarge it .docker run --shm-size=1g., or set loader.num_workers=0"):
        check(monkeypatch, 64 * MIB)
    with pytest.raises(UserError, match="/dev/shm on node1 is full, missing or read-only, but"):
        check(monkeypatch, 0)


def test_ranks_share_the_space_of_their_own_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, two of them in one container."""
    a, b = (shared_memory.SharedMemorySpace(host, host, GIB, GIB) for host in ("a", "b"))
    sizes = BatchSizes(GIB // 6, 0)
    monkeypatch.setattr(shared_memory, "gather_objects", lambda item: [(a, sizes), (b, sizes), (a, sizes)])
    assert len(check_shared_memory_space(sizes, 1, 1)) == 0
    (warning,) = check_shared_memory_space(sizes, 1, 2)
    assert warning.startswith("/dev/shm on a has 1.0 GiB free, but loader workers may use up to 1.7 GiB")
    monkeypatch.setattr(shared_memory, "gather_objects", lambda item: [(a, sizes)] * 4)
    with pytest.raises(UserError, match=r"/dev/shm on a has 1.0 GiB free, but loader workers need at least 1.3 GiB"):
        check_shared_memory_space(sizes, 1, 1)


def test_space_of_existing_missing_and_unlimited_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = os.statvfs(tmp_path)
    space = get_shared_memory_space(tmp_path)
    assert space
    assert space.total == stats.f_blocks * stats.f_frsize
    assert 0 < space.free <= space.total
    missing = get_shared_memory_space(tmp_path / "missing")
    assert missing
    assert missing.free == 0
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_blocks=0))
    assert get_shared_memory_space(tmp_path) is None, "a tmpfs of size=0 has no limit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert get_shared_memory_space(tmp_path) is None


@pytest.fixture
def small_shm() -> list[str]:
    """Return a command prefix that runs the rest of the command with 256 KiB of /dev/shm."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        result = subprocess.run([*mount, "true"], capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("requires the command unshare")
    if result.returncode:
        pytest.skip("requires a host that allows namespaces")
    return mount


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/tests/loading:{ROOT}/tests"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_that_cannot_fit_ends_before_training(tmp_path: Path, motion_root: str, small_shm: list[str]) -> None:
    program = [sys.executable, str(ROOT / "tools/run_net.py"), *TINY, "test.enable=false", "output_dir=out"]
    result = run([*small_shm, *program, f"dataset.root={motion_root}"], tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "/dev/shm" in line
    assert "--shm-size=1g" in line
    assert "loader.num_workers=0" in line
    assert (tmp_path / "out/metrics.jsonl").read_text() == ""


class BusErrorDataset:
    """A dataset that kills its process with SIGBUS, as a full /dev/shm does with some versions of torch."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, request: ClipRequest) -> Sample:
        os.kill(os.getpid(), signal.SIGBUS)
        raise AssertionError


GRID = Grid(16, 96, (1, 1), (96, 96))  # 432 KiB a clip


def requests(step: int) -> BatchRequest:
    return BatchRequest([ClipRequest(0, GRID, step)])


def print_loader_error(motion_root: str, method: str, killed: bool) -> None:
    """Print the error of a loader whose worker runs out of space in /dev/shm."""
    dataset = BusErrorDataset() if killed else motion(motion_root, KNOBS, "train", PyAV())
    try:
        list(Loader(dataset, LoaderOptions(1, 1, method)).load_steps(requests, range(3)))
    except UserError as error:
        print(error)
    except RuntimeError as error:  # torch raises it from a signal handler, wherever this process is
        print(explain_dead_worker(error))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.slow
def test_a_worker_killed_by_sigbus_reports_shared_memory(motion_root: str, tmp_path: Path, method: str) -> None:
    script = f"from test_shared_memory import *; print_loader_error({motion_root!r}, {method!r}, killed=True)"
    (line,) = run([sys.executable, "-c", script], tmp_path).stdout.splitlines()
    assert line.startswith("a loader worker was killed by SIGBUS: /dev/shm (")
    assert line.endswith("enlarge it (docker run --shm-size=…), or lower loader.num_workers or loader.prefetch_factor")


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.slow
def test_a_worker_without_space_reports_shared_memory(
    motion_root: str, small_shm: list[str], tmp_path: Path, filled: bool
) -> None:
    """If /dev/shm is filled before, the queues of the workers cannot be created."""
    fill = "open('/dev/shm/other', 'wb').write(bytes(2**18 - 4096)); " if filled else ""
    script = f"from test_shared_memory import *; {fill}print_loader_error({motion_root!r}, 'forkserver', killed=False)"
    result = run([*small_shm, sys.executable, "-c", script], tmp_path)
    (line,) = result.stdout.splitlines()
    assert line.startswith("/dev/shm, which" if filled else "/dev/shm (1 MiB), which"), result.stderr
