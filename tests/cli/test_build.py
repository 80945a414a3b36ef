"""`fall_back_if_convolutions_are_wrong`: all ranks choose the same precision, and slow kernels only cause a warning."""

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


def choose(
    monkeypatch: pytest.MonkeyPatch, faults: list[ConvolutionFaults], rank: int, precision: str = "auto"
) -> tuple[Precision, list[str]]:
    """Return the precision and warnings of `rank` if the probes of all ranks return `faults`."""
    monkeypatch.setattr("mgvideo.cli.build.probe_convolutions", lambda *_: faults[rank])
    monkeypatch.setattr("mgvideo.cli.build.gather_objects", lambda _: faults)
    model = BF16.place(i3d_small(8, width=8))
    return fall_back_if_convolutions_are_wrong(SimpleNamespace(precision=precision), model, tiny_plan(), BF16)


def test_correct_kernels_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, [GOOD, GOOD], 0) == (BF16, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_gradients_on_one_rank_switch_all_ranks_to_float32(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = choose(monkeypatch, [GOOD, WRONG], rank)
    assert (precision.name, precision.channels_last) == ("fp32", False)
    assert "wrong weight gradients of Conv3d(3, 8) at 4x24" in warning
    assert "training in float32 instead" in warning


@pytest.mark.parametrize("rank", [0, 1])
def test_slow_kernels_only_cause_a_warning(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    precision, (warning,) = choose(monkeypatch, [SLOW, GOOD], rank)
    assert precision is BF16
    assert "3.0 times as long" in warning


def test_explicit_precision_is_kept_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, warnings = choose(monkeypatch, [WRONG, SLOW], 0, precision="bf16")
    assert precision is BF16
    assert len(warnings) == 2
    assert warnings[1].endswith("set precision=fp32 or install another version of torch")
