"""The doctor: a table on this machine, and what it says where something is wrong."""

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


def test_every_check_passes_here_or_says_what_to_do(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FAMILIES", ("r2plus1d_small",))
    monkeypatch.setattr(doctor, "MEASURED_S", 0.1)
    findings = list(doctor.examine(machine.cfg, machine.folder))
    by_name = {finding.check: finding for finding in findings}
    assert {"system", "mgvideo, torch", "packages", "GPU", "precision", "decoder pyav", "CPU cores"} <= set(by_name)
    assert {"/dev/shm", "open files", "disk", "r2plus1d_small", "loader and step"} <= set(by_name)
    assert [finding for finding in findings if finding.status == "failure"] == []
    assert all(finding.remedy for finding in findings if finding.status == "warning")
    assert torch.__version__ in by_name["mgvideo, torch"].found


def test_failures_are_the_exit_code_and_end_no_other_check(
    machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(_: doctor.Machine) -> None:
        raise RuntimeError("a driver is missing")

    def refuses(_: doctor.Machine) -> None:
        raise UserError("precision=fp17: use auto, fp32, bf16 or fp16")

    checks = {"GPU": breaks, "precision": refuses, "open files": doctor.open_files}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    with pytest.raises(SystemExit) as stop:
        doctor.run(doctor.Keys(format="json"), machine.cfg)
    assert stop.value.code == 1
    first, second, third = json.loads(capsys.readouterr().out)
    assert (first["status"], first["found"]) == ("failure", "RuntimeError: a driver is missing")
    assert (second["status"], second["found"]) == ("failure", "precision=fp17: use auto, fp32, bf16 or fp16")
    assert third["check"] == "open files"


def test_limits_that_are_too_low_are_warnings(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    (files,) = doctor.open_files(machine)
    assert (files.status, files.found) == ("warning", "at most 1024")
    assert "ulimit -n" in files.remedy
    monkeypatch.setattr(doctor, "get_shared_memory_space", lambda: SharedMemorySpace("here", "host", 2**26, 2**26))
    (room,) = doctor.shared_memory(machine)
    assert (room.status, room.found) == ("warning", "64 MiB free")
    assert "--shm-size" in room.remedy
    usage = shutil.disk_usage(machine.folder)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    space = next(iter(doctor.disk(machine)))
    assert (space.status, space.remedy) == ("warning", "set output_dir")


def test_a_decoder_that_cannot_be_loaded_is_a_warning(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Decord) -> None:
        raise UserError("decoder: decord is not installed; pip install decord, or choose decoder=pyav")

    monkeypatch.setattr(Decord, "__init__", missing)
    found = {finding.check: finding for finding in doctor.decoders(machine)}
    assert found["decoder pyav"].status == "ok"
    assert found["decoder decord"].status == "warning"
    assert "pip install decord" in found["decoder decord"].remedy


def test_a_gpu_that_torch_does_not_see_is_a_failure(machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: "GPU 0: some card")
    (gpu,) = doctor.gpus(machine)
    assert (gpu.status, gpu.found) == ("failure", "torch does not see GPU 0: some card")


def test_a_network_whose_step_is_not_finite_is_a_failure(
    machine: doctor.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FAMILIES", ("r2plus1d_small",))
    monkeypatch.setattr(doctor, "sgd", lambda model, lr: torch.optim.SGD(model.parameters(), lr=float("nan")))
    (step,) = doctor.families(machine)
    assert (step.check, step.status) == ("r2plus1d_small", "failure")
