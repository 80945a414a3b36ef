"""Which precision a run trains in when the probe finds faults: the same on all ranks, and not for slowness alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from training import tiny_plan

from mgvideo.cli.build import fall_back_if_convolutions_are_wrong
from mgvideo.engine.precision import ConvolutionFaults, Precision
from mgvideo.models.small import i3d_small

BF16 = Precision(torch.device("cpu"), torch.bfloat16, True, "a test")
GOOD = ConvolutionFaults()
WRONG = ConvolutionFaults(wrong=("wrong weight gradients of Conv3d(3, 8) at 4x24",))
SLOW = ConvolutionFaults(slow=("convolutions take 3.0 times as long as in float32",))


def decide(
    monkeypatch: pytest.MonkeyPatch, ranks: list[ConvolutionFaults], rank: int, asked: str = "auto"
) -> tuple[Precision, list[str]]:
    """What a rank decides where the ranks found these faults."""
    monkeypatch.setattr("mgvideo.cli.build.probe_convolutions", lambda *_: ranks[rank])
    monkeypatch.setattr("mgvideo.cli.build.gather_objects", lambda own: [own if r is own else r for r in ranks])
    model = BF16.place(i3d_small(8, width=8))
    return fall_back_if_convolutions_are_wrong(SimpleNamespace(precision=asked), model, tiny_plan(), BF16)


def test_good_kernels_are_used_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, [GOOD, GOOD], 0) == (BF16, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_gradients_on_one_rank_move_all_ranks_to_float32(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = decide(monkeypatch, [GOOD, WRONG], rank)
    assert (precision.name, precision.channels_last) == ("fp32", False)
    assert "wrong weight gradients of Conv3d(3, 8) at 4x24" in warning
    assert "training in float32 instead" in warning


@pytest.mark.parametrize("rank", [0, 1])
def test_slowness_only_warns(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = decide(monkeypatch, [SLOW, GOOD], rank)
    assert precision is BF16
    assert "3.0 times as long" in warning


def test_a_precision_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, warnings = decide(monkeypatch, [WRONG, SLOW], 0, asked="bf16")
    assert precision is BF16
    assert len(warnings) == 2
    assert warnings[1].endswith("set precision=fp32 or install another version of torch")
