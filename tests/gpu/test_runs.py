"""Whole runs on GPUs: bitwise resume, and two ranks over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import TINY, end_state, run_program

from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

DETERMINISTIC = [*TINY, "deterministic=true", "train.evals_per_phase=0", "test.enable=false"]


def run(folder: Path, motion_root: str, *arguments: str, processes: int = 0) -> None:
    """Run a small version of the embedded recipe, with deterministic kernels."""
    words = [*DETERMINISTIC, f"dataset.root={motion_root}", f"output_dir={folder}", *arguments]
    result = run_program(*words, cwd=folder.parent, processes=processes)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_resumed_run_is_bitwise_equal_to_an_undisturbed_run(
    tmp_path: Path, motion_root: str, device: torch.device
) -> None:
    run(tmp_path / "whole", motion_root, "checkpoint.every_steps=5", "checkpoint.keep=100")
    first = min((tmp_path / "whole" / "checkpoints").glob("step_*.pt"))
    run(tmp_path / "resumed", motion_root, f"resume={first}")
    assert end_state(tmp_path / "resumed") == end_state(tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_train_like_one(tmp_path: Path, motion_root: str, cuda: torch.device) -> None:
    run(tmp_path / "one", motion_root, "precision=fp32")
    run(tmp_path / "two", motion_root, "precision=fp32", processes=2)
    one_rank, two_ranks = (weights(tmp_path / name) for name in ("one", "two"))
    assert float((two_ranks - one_rank).norm() / one_rank.norm()) < 1e-3


def weights(folder: Path) -> torch.Tensor:
    """Return all tensors of the newest checkpoint's model as one flat float64 tensor."""
    newest, _ = Checkpoints(folder / "checkpoints").find_newest()
    assert newest is not None
    return torch.cat([tensor.double().flatten() for tensor in read_checkpoint(newest)["model"].values()])
