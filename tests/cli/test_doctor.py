"""`mgvideo doctor`: the checks on this machine, and their results for simulated problems."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from mgvideo.cli import doctor
from mgvideo.cli.app import compose_config
from mgvideo.datasets.decoders import Decord
from mgvideo.errors import UserError
from mgvideo.loading.shared_memory import SharedMemorySpace


@pytest.fixture
def machine(tmp_path: Path) -> doctor.Machine:
    return doctor.Machine(compose_config("run", ["loader.num_workers=1", f"output_dir={tmp_path / 'run'}"]), tmp_path)


@pytest.mark.slow
def test_every_check_passes_or_gives_a_remedy(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NETWORKS", ("r2plus1d_small",))
    monkeypatch.setattr(doctor, "LOADER_MEASUREMENT_S", 0.1)
    results = list(doctor.run_checks(machine.cfg, machine.folder))
    by_name = {result.check: result for result in results}
    assert {"system", "mgvideo, torch", "packages", "GPU", "precision", "decoder pyav", "CPU cores"} <= set(by_name)
    assert {"/dev/shm", "open files", "disk", "r2plus1d_small", "loader and step"} <= set(by_name)
    assert [result for result in results if result.status == "failure"] == []
    assert all(result.remedy for result in results if result.status == "warning")
    assert torch.__version__ in by_name["mgvideo, torch"].found


def test_a_failure_sets_the_exit_code_and_other_checks_still_run(
    machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_runtime_error(_: doctor.Machine) -> None:
        raise RuntimeError("a driver is missing")

    def raise_user_error(_: doctor.Machine) -> None:
        raise UserError("precision=fp17: use auto, fp32, bf16 or fp16")

    checks = {"GPU": raise_runtime_error, "precision": raise_user_error, "open files": doctor.check_open_files}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    with pytest.raises(SystemExit) as stop:
        doctor.run(doctor.DoctorKeys(format="json"), machine.cfg)
    assert stop.value.code == 1
    first, second, third = json.loads(capsys.readouterr().out)
    assert (first["status"], first["found"]) == ("failure", "RuntimeError: a driver is missing")
    assert (second["status"], second["found"]) == ("failure", "precision=fp17: use auto, fp32, bf16 or fp16")
    assert third["check"] == "open files"


def test_low_limits_are_warnings(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    (files,) = doctor.check_open_files(machine)
    assert (files.status, files.found) == ("warning", "at most 1024")
    assert "ulimit -n" in files.remedy
    monkeypatch.setattr(doctor, "get_shared_memory_space", lambda: SharedMemorySpace("here", "host", 2**26, 2**26))
    (room,) = doctor.check_shared_memory(machine)
    assert (room.status, room.found) == ("warning", "64 MiB free")
    assert "--shm-size" in room.remedy
    usage = shutil.disk_usage(machine.folder)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    space = next(iter(doctor.check_disk(machine)))
    assert (space.status, space.remedy) == ("warning", "set output_dir")


@pytest.mark.slow
def test_a_missing_decoder_is_a_warning(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Decord) -> None:
        raise UserError("decoder: decord is not installed; pip install decord, or choose decoder=pyav")

    monkeypatch.setattr(Decord, "__init__", missing)
    results = {result.check: result for result in doctor.check_decoders(machine)}
    assert results["decoder pyav"].status == "ok"
    assert results["decoder decord"].status == "warning"
    assert "pip install decord" in results["decoder decord"].remedy


def test_a_gpu_that_torch_does_not_see_is_a_failure(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: "GPU 0: some card")
    (gpu,) = doctor.check_gpus(machine)
    assert (gpu.status, gpu.found) == ("failure", "torch does not see GPU 0: some card")


def test_a_step_with_non_finite_weights_is_a_failure(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NETWORKS", ("r2plus1d_small",))
    monkeypatch.setattr(doctor, "sgd", lambda model, lr: torch.optim.SGD(model.parameters(), lr=float("nan")))
    (step,) = doctor.check_networks(machine)
    assert (step.check, step.status) == ("r2plus1d_small", "failure")
