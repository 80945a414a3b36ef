"""`mgvideo run` as users start it: real processes and videos, exit codes, and the files that it writes."""

import json
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from refusals import error_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import KNOBS, ROOT, TINY, metrics, run_program

from mgvideo.cli.run import explain_errors, main
from mgvideo.distributed.watchdog import Position
from mgvideo.errors import UserError
from mgvideo.models.small import r2plus1d_small
from mgvideo.storage.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder and result of a successful run on two processes."""
    folder = tmp_path_factory.mktemp("run")
    command = [*TINY, f"dataset.root={motion_root}", "output_dir=out", "base.epochs=4", "base.lr_milestones=[2]"]
    return folder / "out", run_program(*command, cwd=folder, processes=2)


def test_two_processes_train_all_phases_and_test(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["phases"]) > 4
    losses = metrics(folder)
    assert max(losses) == plan["phases"][-1]["steps"][1]
    assert "2 ranks" in result.stdout
    assert result.stdout.count("testing 12 videos") == 1, "only rank 0 prints"


def test_run_writes_report_checkpoints_and_tensorboard(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, result = finished
    report = (folder / "report.md").read_text()
    assert report in result.stdout
    test = json.loads((folder / "test.json").read_text())
    assert f"top1 **{test['top1']:.2f} %**" in report
    assert "tensorboard --logdir" in report
    assert "width: 4" in (folder / "config.yaml").read_text()
    assert (folder / "checkpoints" / "best.pt").exists()
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 100}).Reload()
    assert {"train/loss", "train/phase", "train/size", "train/lr", "val/top1", "test/top1"} <= set(
        events.Tags()["scalars"]
    )
    images = set(events.Tags()["images"])
    assert "test/confusion" in images
    assert any(tag.startswith("clips/phase_") for tag in images)


def test_finished_run_is_tested_again_without_training(
    finished: tuple[Path, subprocess.CompletedProcess], motion_root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    trained = json.loads((folder / "report.json").read_text())
    main([*TINY, f"dataset.root={motion_root}", f"output_dir={folder}", "base.epochs=4", "base.lr_milestones=[2]"])
    assert "resumed" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    tested = json.loads((folder / "report.json").read_text())
    for key in ("train_seconds", "hardware", "precision", "date"):
        assert tested[key] == trained[key], "the values of the training run on two processes"
    assert "2 ranks" in tested["hardware"]


def test_run_on_a_dataset_outside_the_checkout_prints_its_recipe(tmp_path: Path, motion_root: str) -> None:
    """The dataset's YAML names no recipe, so it has the default one."""
    (tmp_path / "configs/dataset").mkdir(parents=True)
    knobs = ", ".join(f"{name}: {getattr(KNOBS, name)}" for name in ("train", "val", "frames", "height", "width"))
    split = "{_target_: mgvideo.datasets.motion.motion, root: '${dataset.root}', knobs: '${dataset.knobs}', split: %s}"
    (tmp_path / "configs/dataset/mine.yaml").write_text(
        "name: mine\ntask: single_label\nnum_classes: 8\nroot: ???\nmax_bad_fraction: 0.05\n"
        f"knobs: {{_target_: mgvideo.datasets.motion.Knobs, {knobs}}}\n"
        f"train: {split % 'train'}\nval: {split % 'val'}\n"
    )
    tiny = [word for word in TINY if "knobs" not in word]
    command = ["--config-dir=configs", "dataset=mine", f"dataset.root={motion_root}", *tiny, "output_dir=out"]
    result = run_program(*command, "train.enable=false", "test.enable=false", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "r2plus1d_small on mine, recipe finetune, without training; run folder out" in result.stdout


def _no_such_folder(folder: Path) -> list[str]:
    return ["dataset=kinetics400", f"dataset.root={folder}/nowhere"]


def _empty_list(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("")
    return ["dataset=kinetics400", f"dataset.root={folder}"]


def _malformed_line(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("a.mp4 0\nb.mp4\n")
    return ["dataset=kinetics400", f"dataset.root={folder}"]


def _label_out_of_range(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("a.mp4 400\n")
    return ["dataset=kinetics400", f"dataset.root={folder}"]


def _other_classes(folder: Path) -> list[str]:
    for path in ("train/run/a.mp4", "train/walk/a.mp4", "val/run/b.mp4"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return ["dataset=folder", f"dataset.root={folder}", "dataset.num_classes=3"]


def _unreadable_videos(folder: Path) -> list[str]:
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(64)))
    for i in range(64):
        (folder / f"{i}.mp4").write_text("not a video")
    return [*TINY[5:], "dataset=kinetics400", f"dataset.root={folder}", "model.width=4"]


@pytest.mark.parametrize(
    ("prepare", "fragment"),
    [
        (_no_such_folder, "nowhere"),
        (_empty_list, "train.csv"),
        (_malformed_line, "train.csv:2"),
        (_label_out_of_range, "train.csv:1"),
        (_other_classes, "dataset.num_classes=3: "),
        (_unreadable_videos, "cannot be read"),
        (lambda _: ["decoder=null"], "decoder=null: choose one of decord, pyav, torchcodec"),
        (lambda _: ["dataset=kinetics400"], "dataset.root is not set"),
        (lambda _: ["precision=fp8"], "choose one of auto, fp32, bf16, fp16"),
        (lambda _: ["base.lr_milestones=[2,1]"], "base.lr_milestones"),
        (lambda _: ["init_from=/nowhere.pyth"], "/nowhere.pyth"),
        (lambda _: ["resume=/nowhere.pt"], "/nowhere.pt"),
    ],
)  # fmt: skip
def test_bad_input_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path,
    motion_root: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prepare,
    fragment,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = prepare(tmp_path)
    if not any(a.startswith("dataset=") for a in arguments):
        arguments = [f"dataset.root={motion_root}", *(a for a in TINY if "knobs" in a), *arguments]
    line = error_line(main, [*arguments, "output_dir=out"], capsys)
    assert line.startswith("error: ")
    assert fragment in line


def test_unknown_key_prints_only_one_line_on_stderr(tmp_path: Path) -> None:
    result = run_program("base.batchh=1", "output_dir=out", cwd=tmp_path, fresh=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: base.batchh is not a key of this config, did you mean base.batch_size?")


@pytest.mark.slow
def test_bad_videos_are_listed_and_training_continues(tmp_path: Path) -> None:
    from mgvideo.datasets.motion import make_motion

    root = make_motion(str(tmp_path / "motion"), KNOBS, processes=1)
    (root / "train/00003.mp4").write_bytes(b"rotten")
    (root / "val/00002.mp4").unlink()
    # Start workers as users do; TINY starts them another way.
    more = [f"dataset.root={tmp_path}/motion", "output_dir=out", "base.epochs=4", "loader.start_method=forkserver"]
    result = run_program(*TINY, *more, cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    listed = (tmp_path / "out/bad_videos.csv").read_text()
    assert "00003.mp4" in listed
    assert listed.count("00003.mp4") == listed.count("00002.mp4") == 1
    report = (tmp_path / "out/report.md").read_text()
    assert "counted as wrong" in report
    assert "1 of 64 training videos could not be read; others replaced them, " in report
    assert "00003.mp4: Invalid data found when processing input" in report


@pytest.mark.slow
def test_precise_bn_runs_before_the_test_without_validation(tmp_path: Path, motion_root: str) -> None:
    command = [*TINY, f"dataset.root={motion_root}", "precision=fp32", "base.epochs=4", "base.lr_milestones=[2]"]
    scores = {}
    for evaluations in (0, 1):
        main([*command, f"output_dir={tmp_path}/evals{evaluations}", f"train.evals_per_phase={evaluations}"])
        scores[evaluations] = json.loads((tmp_path / f"evals{evaluations}/report.json").read_text())["metrics"]
    assert scores[0] == scores[1]


def test_weights_that_do_not_fit_are_reported(tmp_path: Path, motion_root: str) -> None:
    torch.save({"model": r2plus1d_small(5, width=4).state_dict()}, tmp_path / "five.pt")
    data = [*TINY, f"dataset.root={motion_root}", "output_dir=out"]
    only_load = ["init_from=five.pt", "train.enable=false", "test.enable=false", "published_clip=[4,1,32]"]
    result = run_program(*data, *only_load, cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    loaded = len(r2plus1d_small(5, width=4).state_dict()) - 2
    assert f"init_from: {loaded} tensors from five.pt, under model, with names of mgvideo; the head in" in result.stdout
    (warning,) = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.endswith("set base.frame_stride=1; base.frame_stride=2 keeps this run's values without a warning")
    assert result.stderr.strip().splitlines() == [
        "the head in five.pt is for another number of classes: the network keeps its own"
    ]


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_tool_prints_help(tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with suppress(SystemExit):  # argparse exits after --help
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) > 5
    assert shown.err == ""


def test_cfg_job_prints_the_composed_config(tmp_path: Path) -> None:
    result = run_program("model=i3d_r50", "--cfg", "job", cwd=tmp_path, fresh=True)
    assert result.returncode == 0
    assert "mgvideo.models.i3d" in result.stdout
    assert result.stderr == "", "imports cause no warning"


def test_out_of_memory_error_names_the_position_and_a_key(tmp_path: Path) -> None:
    position = Position()
    position.report("after step 4, in precise BN, batch 1 of 2")
    message = r"^out of memory after step 4, in precise BN, batch 1 of 2: lower train.micro_batch_clips"
    for allocate in (lambda: torch.empty(2**50), lambda: bytearray(2**60)):
        with (
            pytest.raises(UserError, match=message),
            explain_errors(OmegaConf.create(), Checkpoints(tmp_path), position),
        ):
            allocate()


def test_non_deterministic_kernel_is_refused_with_the_key(tmp_path: Path) -> None:
    pooled, indices = F.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    torch.use_deterministic_algorithms(True)
    try:
        message = r"^deterministic=true: max_unpooling2d\S* does not have a deterministic implementation: set determ"
        with (
            pytest.raises(UserError, match=message),
            explain_errors(OmegaConf.create(), Checkpoints(tmp_path), Position()),
        ):
            F.max_unpool2d(pooled, indices, 2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_torch_errors_stay_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="mat1"),
        explain_errors(OmegaConf.create(), Checkpoints(tmp_path), Position()),
    ):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
