"""The trainer: learning, logs, resuming, micro-batches, compilation, and errors."""

import copy
import csv
import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth
from training import KNOBS, metrics, tiny_plan, tiny_trainer

from mgvideo.cli.benchmark import steps_replaced
from mgvideo.datasets.motion import make_motion
from mgvideo.distributed.signals import Stopped
from mgvideo.engine.freezing import freeze
from mgvideo.engine.optimizers import adamw, lamb
from mgvideo.engine.train_step import TrainStep
from mgvideo.engine.trainer import Trainer
from mgvideo.errors import UserError
from mgvideo.loading.loader import Batch
from mgvideo.models.features import find_classifier
from mgvideo.models.small import i3d_small, r2plus1d_small
from mgvideo.storage.checkpoints import read_checkpoint
from mgvideo.storage.files import write_atomic

pytestmark = pytest.mark.numeric


def weights(trainer: Trainer, close: bool = True) -> dict[str, Tensor]:
    if close:
        trainer.logger.close()
    models = (trainer.model, trainer.evaluated_model)
    return {f"{i}.{name}": value.clone() for i, m in enumerate(models) for name, value in m.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_the_loss_falls_and_the_training_clips_are_learned(tmp_path: Path, motion_root: str) -> None:
    plan = tiny_plan("multigrid", epochs=60, lr_milestones=(45,), warmup_epochs=4.0, lr=0.1)
    trainer = tiny_trainer(
        tmp_path,
        motion_root,
        plan,
        model=i3d_small(8, width=8),
        workers=2,
        validate=True,
        evals_per_phase=0,
        precise_bn_clips=64,
    )
    trainer.train()
    losses = list(metrics(tmp_path).values())
    assert sum(losses[:3]) / 3 > 2.0
    assert sum(losses[-3:]) / 3 < 1.4
    trainer.precise_bn()
    evaluator, views = trainer.validate
    result = replace(evaluator, loader=trainer.loader)(trainer.model, views)
    assert trainer.train_step.task.metrics(result.scores, result.labels)["top1"] > 50  # chance is 12.5


def test_metrics_follow_the_plan(tmp_path: Path, motion_root: str) -> None:
    plan = tiny_plan()
    trainer = tiny_trainer(tmp_path, motion_root, plan, validate=True)
    trainer.train()
    trainer.logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    ends = {phase.steps[1] for phase in plan.phases}
    assert {line["step"] for line in train} == ends | set(range(2, plan.steps + 1, 2))
    for line in train:
        slot = plan.slot(line["step"] - 1)
        assert (line["frames"], line["size"], line["batch"]) == (slot.grid.frames, slot.grid.size, slot.batch)
        assert line["lr"] == plan.lr(line["step"] - 1)
    assert {line["step"] for line in lines if "val_top1" in line} == ends
    assert trainer.checkpoints.steps()[-1] == plan.steps
    assert trainer.checkpoints.best.exists()


@pytest.mark.parametrize(
    ("validate", "optimizer"),
    [
        (False, {}),
        (True, {"build_optimizer": adamw, "ema": 0.9, "clip_grad_norm": 0.5}),
        (False, {"build_optimizer": lamb}),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, motion_root: str, validate: bool, optimizer: dict[str, Any]
) -> None:
    plan = tiny_plan(epochs=8, lr_milestones=(5,))
    model = nn.Sequential(i3d_small(16, width=4), nn.Dropout(0.3), nn.Linear(16, 8))
    options = {"validate": validate, "precise_bn_clips": 8, "checkpoint_every": 3, "seed": 5, **optimizer}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = tiny_trainer(tmp_path / "whole", motion_root, plan, model=model, **options)
    whole.train()
    expected = weights(whole)
    assert len({phase.steps for phase in plan.phases if phase.num_steps > 1}) > 3
    for stop in (3, plan.steps - 3 - plan.steps % 3):
        model.load_state_dict(start)
        folder = tmp_path / f"cut{stop}"
        interrupted = tiny_trainer(folder, motion_root, plan, model=model, **options)
        train_step = interrupted.train_step

        def interrupt(step: int, batch: Batch, stop: int = stop, train_step: TrainStep = train_step) -> Tensor:
            if step == stop + 1:
                raise KeyboardInterrupt
            return train_step(step, batch)

        with steps_replaced(interrupted, interrupt), pytest.raises(KeyboardInterrupt):
            interrupted.train()
        interrupted.checkpoints.wait()
        interrupted.logger.close()
        newest, _ = interrupted.checkpoints.find_newest()
        assert newest is not None
        state = read_checkpoint(newest)
        assert state["progress"]["step"] in (stop, stop + 1)  # stop + 1 if a phase ends there
        for parameter in model.parameters():  # the resumed run must not use weights of the first one
            parameter.data.normal_()
        resumed = tiny_trainer(folder, motion_root, plan, model=model, workers=2, **options)
        resumed.load(state)
        resumed.train()
        assert_equal(weights(resumed), expected)


def test_micro_batches_do_not_change_the_results(tmp_path: Path, motion_root: str) -> None:
    plan = tiny_plan()
    torch.manual_seed(0)
    dropout_layers = [nn.Dropout3d(0.2), StochasticDepth(0.1, "row"), nn.Dropout(0.1)]
    model = nn.Sequential(*dropout_layers, r2plus1d_small(8, width=4, dropout=0.3))
    whole = tiny_trainer(tmp_path / "whole", motion_root, plan, model=copy.deepcopy(model), double=True)
    whole.train()
    split = tiny_trainer(tmp_path / "split", motion_root, plan, model=model, double=True, micro_batch_clips=8)
    split.train()
    norms = [metrics(tmp_path / name, "grad_norm") for name in ("whole", "split")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert_equal(weights(split), weights(whole), tolerance=1e-9)
    assert metrics(tmp_path / "split") == pytest.approx(metrics(tmp_path / "whole"), rel=1e-9)


def test_frozen_parts_keep_weights_and_statistics(tmp_path: Path, motion_root: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), r2plus1d_small(8, width=4))
    freeze(model, "backbone", find_classifier)
    options = {"precise_bn_clips": 8, "ema": 0.9, "validate": True}
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan(), model=model, **options)
    before = weights(trainer, close=False)
    trainer.train()
    after = weights(trainer)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    head = {name for name in after if name.endswith(("fc.weight", "fc.bias"))}
    assert len(head) == 4, "of the network and of its average"
    assert changed == head
    assert model[0].training, "only parts with frozen parameters are in evaluation mode"
    assert len(trainer.optimizer.state_dict()["state"]) == 2


def test_the_average_is_evaluated_and_saved(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan(), validate=True, ema=0.9, precise_bn_clips=8)
    before = weights(trainer, close=False)
    trainer.train()
    state = read_checkpoint(trainer.checkpoints.path(trainer.plan.steps))
    average, network = state["model_ema"], state["model"]
    assert all(torch.equal(average[name], value) for name, value in trainer.evaluated_model.state_dict().items())
    name = next(name for name in network if name.endswith("conv.weight") or name.endswith("0.weight"))
    assert not torch.equal(average[name], network[name])
    assert not torch.equal(average[name], before[f"0.{name}"])
    evaluator, views = trainer.validate  # type: ignore[misc]
    result = evaluator(trainer.evaluated_model, views)
    top1 = trainer.train_step.task.metrics(result.scores, result.labels)["top1"]
    assert metrics(tmp_path, "val_top1")[trainer.plan.steps] == pytest.approx(top1)


class SyncCounter(TorchDispatchMode):
    """Counts how often the host reads a value of the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_steps_never_wait_for_the_device(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan("short"), clip_grad_norm=1.0, ema=0.9)
    all_syncs, step_syncs = SyncCounter(), SyncCounter()
    train_step = trainer.train_step

    def counted_step(step: int, batch: Batch) -> Tensor:
        with step_syncs:
            return train_step(step, batch)

    with all_syncs, steps_replaced(trainer, counted_step):
        trainer.train()
    trainer.logger.close()
    assert all_syncs.count > 0, "log steps read the loss"
    assert step_syncs.count == 0


@pytest.mark.slow
def test_compiled_training_has_one_graph_a_slot_and_the_same_results(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan("short", epochs=4, lr_milestones=(3,))
    eager = tiny_trainer(tmp_path / "eager", motion_root, plan, double=True)
    eager.train()
    graphs = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: real(model, backend=graphs, dynamic=dynamic))
    torch._dynamo.reset()
    compiled = tiny_trainer(tmp_path / "compiled", motion_root, plan, double=True, compile="default", validate=True)
    compiled.train()
    slots = {(slot, phase.bn_groups) for phase in plan.phases for slot in phase.slots}
    assert graphs.frame_count == len(slots)
    assert_equal(weights(compiled), weights(eager), tolerance=1e-8)


def test_the_profiler_writes_a_trace_of_its_steps(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan("baseline"), profile=2)
    trainer.train()
    trainer.logger.close()
    events = json.loads((tmp_path / "profile/rank0.pt.trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == 2
    assert "conv" in (tmp_path / "profile/kernels.txt").read_text()


def test_a_run_that_is_stopped_writes_its_trace(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan("baseline"), profile=1000)
    monkeypatch.setattr(
        "mgvideo.engine.trainer.received_signal", lambda: signal.SIGTERM if trainer.progress.step == 6 else None
    )
    with pytest.raises(Stopped):
        trainer.train()
    assert "ProfilerStep#6" in (tmp_path / "profile/rank0.pt.trace.json").read_text()


def test_a_run_that_moves_records_all_its_hardware(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan("baseline"))
    state = trainer.state()
    for key in ("hardware", "precision", "date"):  # older checkpoints lack these
        del state["progress"][key]
    trainer.load(state)
    for hardware in ("a GPU", "two GPUs", "a GPU"):
        trainer.progress.record_environment(hardware, "bf16")
        trainer.load(trainer.state())
    trainer.logger.close()
    assert (trainer.progress.hardware, trainer.progress.precision) == ("a GPU; two GPUs", "bf16")


def test_a_non_finite_loss_ends_the_run_before_the_step(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_slowly(path: Path, data: bytes) -> None:
        time.sleep(0.5)
        write_atomic(path, data)

    monkeypatch.setattr("mgvideo.storage.checkpoints.write_atomic", write_slowly)
    plan = tiny_plan("baseline")
    trainer = tiny_trainer(tmp_path, motion_root, plan, checkpoint_every=2)
    real, calls = trainer.train_step.task.loss, 0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return real(logits, labels) * (float("nan") if calls == 4 else 1.0)

    trainer.train_step.task.loss = loss  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"step 3 \(phase 1, 8×32².*step_00000002.pt"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values() if value.is_floating_point())


def reported_positions(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None]]:
    """Train, and return the positions that the trainer reports, with the seconds that it may stay there."""
    positions: list[tuple[str, float | None]] = []

    def record(where: str, order: tuple[int, ...] = (), limit: float | None = None) -> None:
        positions.append((where, limit))

    monkeypatch.setattr(trainer.train_step.position, "report", record)
    trainer.train()
    trainer.logger.close()
    return positions


def test_precise_bn_and_validation_have_a_time_limit(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"precise_bn_clips": 16, "hang_timeout": 7}
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan(), validate=True, **options)
    positions = reported_positions(trainer, monkeypatch)
    for activity in ("in precise BN", "validating"):
        assert {limit for where, limit in positions if activity in where} == {7, None}  # None: waiting for other ranks


def test_a_step_that_compiles_has_no_time_limit(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgvideo.engine.train_step.compile_model", lambda model, mode, plan: model)
    plan = tiny_plan(epochs=4)
    trainer = tiny_trainer(tmp_path, motion_root, plan, compile="default", hang_timeout=7)
    forward = [limit for where, limit in reported_positions(trainer, monkeypatch) if "forward" in where]
    graphs = [(plan.slot(step), plan.phase(step).bn_groups) for step in range(plan.steps)]
    assert forward == [7 if graph in graphs[:step] else None for step, graph in enumerate(graphs)]
    assert 7 in forward


def test_loading_keeps_the_settings_of_the_optimizer_and_the_scale_of_another_precision(
    tmp_path: Path, motion_root: str
) -> None:
    plan = tiny_plan("baseline")
    first = tiny_trainer(tmp_path / "first", motion_root, plan)
    first.model.to(memory_format=torch.channels_last_3d)  # as in bf16
    first.train()
    first.logger.close()
    state = read_checkpoint(first.checkpoints.path(plan.steps))
    resumed = tiny_trainer(tmp_path / "resumed", motion_root, plan)
    resumed.optimizer.param_groups[0].update(weight_decay=0.5, momentum=0.3)
    resumed.train_step.scaler = torch.amp.GradScaler("cpu")  # as in fp16
    resumed.load(state)
    resumed.logger.close()
    group = resumed.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.3)
    for number, parameter in enumerate(resumed.model.parameters()):
        momentum, saved = resumed.optimizer.state[parameter]["momentum_buffer"], state["optimizer"]["state"][number]
        assert torch.equal(momentum, saved["momentum_buffer"])
        assert momentum.stride() == parameter.stride()
    assert resumed.train_step.scaler.is_enabled()
    other = tiny_trainer(tmp_path / "other", motion_root, plan, model=i3d_small(8, width=8))
    with pytest.raises(UserError, match="does not fit this network"):
        other.load(state)
    other.logger.close()
    other = tiny_trainer(tmp_path / "adamw", motion_root, plan, build_optimizer=adamw)
    with pytest.raises(UserError, match=r"the state of SGD, which is not for AdamW: .*init_from="):
        other.load(state)
    other.logger.close()


def test_an_out_of_memory_error_in_evaluation_names_the_key_to_lower(tmp_path: Path, motion_root: str) -> None:
    trainer = tiny_trainer(tmp_path, motion_root, tiny_plan("baseline"), validate=True)
    trainer.logger.close()
    assert trainer.validate is not None
    evaluator, views = trainer.validate
    trainer.model.register_forward_hook(lambda *_: torch.empty(2**50))
    cases = ((8, r"test\.batch_size=4 \(now 8\)"), (1, r"test\.num_crops=1 or less test\.crop_size"))
    for batch_size, key in cases:
        with pytest.raises(UserError, match=rf"^out of memory .* {batch_size} crops of 8×32² .* try {key}$"):
            replace(evaluator, batch_size=batch_size)(trainer.model, views)


def test_a_bad_clip_counts_once_even_with_several_substitutes(tmp_path: Path, motion_root: str) -> None:
    folder = make_motion(motion_root, KNOBS)
    shutil.copytree(folder, tmp_path / folder.name)
    files = sorted((tmp_path / folder.name / "train").glob("*.mp4"))
    for file in files[::2]:
        file.write_text("no video")
    trainer = tiny_trainer(tmp_path / "run", str(tmp_path), tiny_plan("baseline", epochs=4), workers=1)
    with pytest.raises(UserError, match=r"\d+ of \d+ clips could not be read") as error:
        trainer.train()
    bad, clips = map(int, re.findall(r"(\d+) of (\d+) clips", str(error.value))[0])
    trainer.logger.close()
    requests = [request for step in range(trainer.progress.step) for request in trainer.sampler.shard(step).clips]
    paths = [trainer.loader.dataset.path(request.index) for request in requests]
    assert clips == len(requests) >= 100
    assert bad == sum(path in map(str, files[::2]) for path in paths)
    with open(tmp_path / "run/bad_videos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows)
    assert sum(int(row["count"]) for row in rows) > 1.5 * bad, "every try counts"
