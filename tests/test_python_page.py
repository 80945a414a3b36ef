"""The code blocks of docs/python.md run, one after the other, and the functions that they call raise clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from documents import blocks
from training import KNOBS, ROOT

from mgvideo.cli import api
from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.datasets.motion import motion
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid


def test_all_code_blocks_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    codes = ["\n".join(lines) for language, lines in blocks(page) if language == "python"]
    assert len(codes) == 7
    for code in codes:
        exec(compile(code, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "64 videos; torch.Size([16, 64, 64, 3])" in out
    assert names["logits"].shape == (1, 8)
    assert names["plan"].steps > 3
    assert names["folder"] == Path("runs/motion/slowfast_small_multigrid_seed0")
    assert '"top1"' in out
    assert len(out.strip().splitlines()[-3:]) == 3


def test_a_number_is_the_middle_clip_of_a_video(motion_root: str) -> None:
    dataset = motion(motion_root, KNOBS, "val", PyAV())
    with pytest.raises(UserError, match=r"set dataset\.grid, or build it with build_data"):
        dataset[0]
    dataset.grid = Grid(4, 32, (2, 2), (32, 32))
    sample = dataset[1]
    view = dataset[ClipRequest(1, dataset.grid, 0, View(0, 1, 1))]
    assert sample.clip.shape == (4, 32, 32, 3)
    assert sample.clip.dtype == torch.uint8
    assert torch.equal(sample.clip, view.clip[0])
    assert (sample.index, int(sample.label)) == (1, 1)
    assert torch.equal(dataset[1 - len(dataset)].clip, sample.clip)
    assert len(list(dataset)) == KNOBS.val
    for number in (KNOBS.val, -KNOBS.val - 1):
        with pytest.raises(IndexError, match=f"video {number} of a dataset of {KNOBS.val}"):
            dataset[number]


def test_a_number_of_a_broken_video_raises(motion_root: str, tmp_path: Path) -> None:
    dataset = motion(motion_root, KNOBS, "val", PyAV())
    dataset.root = str(tmp_path)
    dataset.grid = Grid(4, 32, (2, 2), (32, 32))
    with pytest.raises(DecodeError):
        dataset[0]


def test_compose_checks_values_and_suggests_keys() -> None:
    with pytest.raises(UserError, match=r"base\.batch is not a key of this config, did you mean base\.batch_size"):
        api.compose("base.batch=3")
    with pytest.raises(UserError, match=r"test\.num_crops=2: choose one of 1, 3"):
        api.compose("test.num_crops=2")
    cfg = api.compose("experiment=kinetics/slowfast_8x8_r50", "seed=3")
    assert cfg.output_dir == "runs/kinetics400/kinetics-slowfast_8x8_r50/slowfast_8x8_r50_multigrid_seed3"
    assert "hydra" not in cfg


def test_a_network_needs_its_number_of_classes_and_can_have_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"call build_data\(cfg\) first"):
        api.build_network(api.compose("dataset=folder", "dataset.root=/data", "model=r2plus1d_small"))
    network = api.build_network(api.compose("model=r2plus1d_small"))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded = api.build_network(api.compose("model=r2plus1d_small", "seed=1", f"init_from={tmp_path / 'weights.pt'}"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
