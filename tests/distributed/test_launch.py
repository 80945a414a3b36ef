"""Environment variables of launchers, the errors over invalid ones, and the choice of GPUs."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import free_port

from mgvideo.distributed import process_group as distributed
from mgvideo.distributed.launch import choose_gpu, first_host, ranks_from_slurm
from mgvideo.distributed.process_group import process_group
from mgvideo.distributed.watchdog import RankError
from mgvideo.errors import UserError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "node[07-08]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all variables of launchers during the test."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")})
    for name in TORCHRUN:
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("n[1-3,7]", "n1"),
        ("n[007-012],m1", "n007"),
        ("n[9,11]", "n9"),
        ("rack[2-3]node[04-05,9],x", "rack2node04"),
        ("c[1-2]-ib.example.org", "c1-ib.example.org"),
    ],
)
def test_first_host_of_a_slurm_host_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_srun_ranks_are_read_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update(SRUN, PATH="/nowhere")
    ranks_from_slurm()
    assert {name: os.environ[name] for name in TORCHRUN[:5]} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node07",
    }  # fmt: skip
    port = int(os.environ.pop("MASTER_PORT"))
    assert 12000 <= port < 32000
    del os.environ["WORLD_SIZE"]
    os.environ["SLURM_STEP_ID"] = "3"
    ranks_from_slurm()
    assert int(os.environ["MASTER_PORT"]) != port, "two steps of a job may run side by side"


def test_variables_of_a_batch_script_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update(SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    del os.environ["SLURM_STEP_NODELIST"]
    ranks_from_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]) == ("10.0.0.1", "29500", "3")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_GTIDS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_missing_srun_variables_are_named(missing: str) -> None:
    os.environ.update(SRUN)
    del os.environ[missing]
    with pytest.raises(UserError, match=rf"srun started 4 processes, but {missing} is not set here: pass"):
        ranks_from_slurm()
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    "variables",
    [
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # srun -n1 in a larger job
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"},  # a shell of salloc
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n1"},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1"},  # a container that passes on only this one
    ],
)
def test_one_process_joins_no_process_group(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    with process_group() as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert not dist.is_initialized()


RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: torchrun or srun sets it"),
        ({"WORLD_SIZE": "2"}, "RANK: torchrun or srun sets it"),
        ({**RANK, "RANK": "-1"}, "RANK=-1: torchrun or srun sets it"),
        ({**RANK, "RANK": "2"}, "RANK=2 WORLD_SIZE=2: ranks count from 0, so 1 is the last"),
        ({**RANK, "MASTER_PORT": ""}, "MASTER_PORT=: torchrun or srun sets it"),
        ({**RANK, "MASTER_PORT": "70000"}, "cannot meet the others at MASTER_ADDR=localhost MASTER_PORT=70000"),
        ({**RANK, "MASTER_ADDR": ""}, "cannot meet the others at MASTER_ADDR= MASTER_PORT=29500"),
        ({**RANK, "MASTER_ADDR": "no.such.host.invalid"}, "cannot meet the others at MASTER_ADDR=no.such.host.invalid"),
    ],
)
def test_invalid_variables_are_named(variables: dict[str, str], message: str) -> None:
    os.environ.update(variables)
    with pytest.raises(UserError, match=message), process_group(timeout_s=1):
        pass


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        os.environ.update(RANK, RANK="0", MASTER_PORT=str(other.getsockname()[1]))
        message = r"rank 0 of 2 cannot meet the others at .*\(.*\): .* a port that is free"
        with pytest.raises(UserError, match=message), process_group(timeout_s=1):
            pass


def test_missing_ranks_are_an_error() -> None:
    os.environ.update(RANK, RANK="0", MASTER_PORT=str(free_port()))
    message = "rank 0 of 2 cannot meet the others at .* start all ranks"
    with pytest.raises(UserError, match=message), process_group(timeout_s=1):
        pass


def test_each_rank_chooses_its_own_gpu() -> None:
    node = ["a", "b", "c", "d"]
    cases = {
        "all GPUs of a node visible to all": ([node] * 4, [0, 1, 2, 3]),
        "two nodes": ([["a", "b"]] * 2 + [["c", "d"]] * 2, [0, 1, 0, 1]),
        "--gpus-per-task=1": ([["a"], ["b"], ["c"], ["d"]], [0, 0, 0, 0]),
        "two for each task": ([["a", "b"], ["c", "d"]], [0, 0]),
        "each in its own order": ([["a", "b"], ["b", "a"]], [0, 0]),
        "one rank bound to a GPU": ([["a"], ["a", "b"]], [0, 1]),
        "no GPUs": ([[], []], [None, None]),
    }
    for name, (visible, expected) in cases.items():
        assert [choose_gpu(rank, visible) for rank in range(len(visible))] == expected, name


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ([["a"], ["a"]], "rank 1 has no GPU of its own: earlier ranks took the 1 that are visible to it"),
        ([["a", "b"]] * 3, "rank 2 has no GPU of its own: earlier ranks took the 2 that are visible"),
        ([["a"], []], "rank 1 has no GPU of its own: none is visible to it"),
        ([[], ["a"]], "rank 0 has no GPU of its own: none is visible to it"),
    ],
)
def test_two_ranks_on_one_gpu_are_an_error(visible: list[list[str]], message: str) -> None:
    for rank in range(len(visible)):
        with pytest.raises(UserError, match=message):
            choose_gpu(rank, visible)


def join_with_one_gpu(rank: int, port: int, gpus: list[str], out: Path) -> None:
    """Join as a rank with one imitated GPU, and exit where NCCL would start."""
    os.environ.update(RANK, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=gpus[rank])

    def record_and_exit(backend: str, device_id: torch.device, **_: object) -> None:
        (out / str(rank)).write_text(f"{backend} on {device_id}")
        while len(list(out.iterdir())) < len(gpus):  # rank 0 holds the store, which the other still reads
            time.sleep(0.01)
        os._exit(0)

    distributed.dist.init_process_group = record_and_exit
    try:
        with process_group(timeout_s=60):
            pass
    except (UserError, RankError) as error:
        (out / str(rank)).write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("gpus", [["a", "b"], ["a", "a"]])
def test_a_rank_takes_its_only_gpu_unless_another_rank_has_it(tmp_path: Path, gpus: list[str]) -> None:
    arguments = (free_port(), gpus, tmp_path)
    mp.start_processes(join_with_one_gpu, arguments, nprocs=2, start_method="fork")
    messages = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    if gpus[0] == gpus[1]:
        assert all("rank 1 has no GPU of its own" in message for message in messages)
    else:
        assert messages == ["nccl on cuda:0"] * 2


def test_one_process_takes_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with process_group() as device:
        assert device == torch.device("cuda", 0)
    assert chosen == [device]
