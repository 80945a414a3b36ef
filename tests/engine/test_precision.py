"""The choice of precision, and the probe for faulty convolutions on good and on wrong kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_plan
from mgvideo.engine.forward_check import check_forward
from mgvideo.engine.micro_batches import clips_that_fit
from mgvideo.engine.precision import (
    ConvolutionFaults,
    Precision,
    choose_precision,
    cudnn_warning,
    is_worth_tuning,
    probe_convolutions,
)
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.models.small import i3d_small
from mgvideo.plan.plan import Grid

pytestmark = pytest.mark.numeric

GRIDS = [Grid(2, 16, (1, 1), (16, 16)), Grid(4, 24, (1, 1), (24, 24))]
BF16 = Precision(torch.device("cpu"), torch.bfloat16, True, "a test")
GPU = torch.device("cuda")
CPU = torch.device("cpu")


def test_auto_is_bf16_if_onednn_may_use_bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for limit in ("", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "ALL"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert choose_precision("auto", CPU).dtype is torch.bfloat16
        assert choose_precision("bf16", CPU).warning is None
    for limit in ("AVX512_CORE", "AVX2", "avx2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert str(choose_precision("auto", CPU)) == "fp32, channels_last_3d (this CPU has no bf16 instructions)"
        bf16 = choose_precision("bf16", CPU)
        assert bf16.dtype is torch.bfloat16
        assert bf16.warning is not None
        assert "3.5 times as long" in bf16.warning
        assert choose_precision("fp32", CPU).warning is None


def test_auto_is_float32_on_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert str(choose_precision("auto", CPU)) == "fp32, channels_last_3d (bf16 has not been measured on aarch64)"
    assert "not been measured on aarch64" in str(choose_precision("bf16", CPU).warning)


class BrokenPrecision(Precision):
    """A precision whose convolutions return NaN for clips of 24 pixels."""

    @contextmanager
    def autocast(self) -> Iterator[None]:  # type: ignore[override]
        real = nn.functional.conv3d

        def conv3d(clips: Tensor, *rest: object) -> Tensor:
            return real(clips, *rest) * (float("nan") if clips.shape[-1] == 24 else 1.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "conv3d", conv3d)
            yield


def test_the_probe_finds_no_fault_in_good_kernels_and_leaves_the_generator_unchanged() -> None:
    model = BF16.place(i3d_small(8, width=64))
    before = torch.random.get_rng_state()
    assert probe_convolutions(model, GRIDS, BF16) == ConvolutionFaults()
    assert torch.equal(torch.random.get_rng_state(), before), "weights and dropout must not depend on the probe"
    fp32 = choose_precision("fp32", torch.device("cpu"))
    assert probe_convolutions(i3d_small(8, width=8), GRIDS, fp32) == ConvolutionFaults()


def test_the_probe_names_a_wrong_kernel_and_its_grid() -> None:
    model = i3d_small(8, width=8)
    faults = probe_convolutions(model, GRIDS, BrokenPrecision(torch.device("cpu"), torch.bfloat16, False, "a test"))
    (fault,) = faults.wrong
    assert fault.startswith("wrong weight gradients of Conv3d(3, 8")
    assert fault.endswith("at 4x24")
    assert not faults.slow
    assert model.trunk.stem.conv.weight.grad is None


def test_only_long_runs_let_cudnn_time_its_kernels() -> None:
    cfg = compose_config("run", ["experiment=kinetics/slowfast_8x8_r50", "dataset.root=unused"])
    assert is_worth_tuning(build_plan(cfg, 240_000))
    assert not is_worth_tuning(build_plan(cfg, 1_000))


def test_probes_turn_off_the_benchmark_mode_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_modes = []
    real = nn.functional.conv3d

    def conv3d(clips: Tensor, *rest: object) -> Tensor:
        benchmark_modes.append(torch.backends.cudnn.benchmark)
        return real(clips, *rest)

    monkeypatch.setattr(nn.functional, "conv3d", conv3d)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as a run sets it
    model = convert_group_batchnorm(i3d_small(8, width=8))
    probe_convolutions(model, GRIDS[:1], BF16)
    clips_that_fit(model, GRIDS[0], BF16, 2**30)
    check_forward(model, GRIDS[0], torch.device("cpu"))
    assert len(benchmark_modes) >= 6
    assert not any(benchmark_modes)
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("version", "dtype", "warns"),
    [
        (90701, torch.bfloat16, False),
        (90800, torch.bfloat16, True),
        (91002, torch.bfloat16, True),
        (91400, torch.bfloat16, True),
        (91501, torch.bfloat16, False),
        (92000, torch.bfloat16, False),
        (91002, torch.float16, False),
        (91002, None, False),
        (None, torch.bfloat16, False),
    ],
)
def test_releases_of_cudnn_that_compute_wrongly_in_bf16_give_a_warning(
    version: int | None, dtype: torch.dtype | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    warning = cudnn_warning(Precision(GPU, dtype, True, "a test"))
    assert (warning is not None) == warns
    assert cudnn_warning(BF16) is None
    if version == 91002 and warning:
        assert warning.startswith("cuDNN 9.10 computes")
