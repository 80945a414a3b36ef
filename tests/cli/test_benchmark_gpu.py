"""`mgvideo benchmark gpu`, rehearsed on the CPU: sections run as separate processes, and a failure affects one only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgvideo.cli.app import compose_config
from mgvideo.cli.benchmark import gpu as benchmark_gpu
from mgvideo.cli.benchmark.gpu import Keys, Section


def test_sections_run_in_order_and_a_failure_affects_only_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "first": Section(["-c", "print('output of the first')"], 30),
        "fails": Section(["-c", "raise SystemExit(3)"], 30),
        "hangs": Section(["-c", "import time; time.sleep(600)"], 1),
        "last": Section(["-c", ""], 30),
    }
    monkeypatch.setattr(benchmark_gpu, "make_sections", lambda out, rehearse: sections)
    benchmark_gpu.run(Keys(out=str(tmp_path / "out")), compose_config("run", []))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["first: ok", "fails: exit code 3"]
    assert lines[2].startswith("hangs: stopped at its limit of 1 s")
    assert lines[3].startswith("last: ok")
    assert "output of the first" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("rehearse", [True, False])
def test_the_command_of_every_section_composes(rehearse: bool, tmp_path: Path) -> None:
    from mgvideo.cli import doctor, keys
    from mgvideo.cli.benchmark import step as benchmark_step
    from mgvideo.cli.benchmark import train as benchmark_train

    programs = {"step": benchmark_step.Keys, "train": benchmark_train.Keys, "doctor": doctor.DoctorKeys}
    for section in benchmark_gpu.make_sections(tmp_path, rehearse).values():
        words = [word for word in section.words if "=" in word]
        name = next((word for word in reversed(section.words) if word in programs), None)
        rest = words
        if name and "benchmark" in section.words:
            own, rest = keys.split(programs[name], words)
            keys.read(programs[name], own)
        compose_config("run", [word for word in rest if not word.startswith(("format=", "-"))])


def test_every_layer_variant_is_measured() -> None:
    times = benchmark_gpu.measure_layers(torch.device("cpu"), benchmark_gpu.SMALL_FEATURE_MAP_SHAPES)
    assert len(times) == 8
    assert all(time > 0 for time in times.values())
    json.dumps(times)
