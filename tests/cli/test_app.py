"""`same_command`: the command line that repeats a run with changed values, for every way to start it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from refusals import error_line

from mgvideo.cli.app import compose_config, same_command
from mgvideo.cli.run import main

OVERRIDES = ["dataset.root=/my data", "base.short_side=[36,40]", "base.lr=0.1", "resume=never", "+model.extra=1"]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
STARTS = {
    "script": (["tools/run_net.py"], {}, ["PYTHON", "tools/run_net.py"]),
    "script elsewhere": (["HERE/tools/run_net.py"], {}, ["PYTHON", "tools/run_net.py"]),
    "installed": (["/opt/bin/mgvideo", "run"], {}, ["/opt/bin/mgvideo", "run"]),
    "module": (["/opt/mgvideo/cli/__main__.py", "run"], {}, ["PYTHON", "-m", "mgvideo.cli", "run"]),
    "torchrun": (
        ["tools/run_net.py"],
        TORCHRUN,
        ["PYTHON", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "tools/run_net.py"],
    ),
    "installed, torchrun": (
        ["/opt/bin/mgvideo", "run"],
        TORCHRUN,
        [
            *("PYTHON", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
            *("--no-python", "/opt/bin/mgvideo", "run"),
        ],
    ),
    "two nodes": (["tools/run_net.py"], {**TORCHRUN, "WORLD_SIZE": "8"}, ["PYTHON", "tools/run_net.py"]),
}


@pytest.mark.parametrize("start", STARTS)
def test_same_command_starts_the_same_program_with_changed_keys(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, environment, expected = STARTS[start]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(HydraConfig, "get", lambda: compose_config("run", OVERRIDES).hydra)
    # hydra.main sees sys.argv without the name of the program
    words = [word.replace("HERE", str(tmp_path)) for word in argv if word != "run"]
    monkeypatch.setattr(sys, "argv", [*words, *OVERRIDES])
    command = same_command({"base.lr": "0.05"}, without=["resume"])
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    unchanged = ["dataset.root=/my data", "base.short_side=[36,40]", "+model.extra=1"]
    assert shlex.split(command) == [python if word == "PYTHON" else word for word in expected] + [
        *unchanged,
        "base.lr=0.05",
    ]


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder with a model config of its own."""
    folder = tmp_path / "my configs"
    (folder / "model").mkdir(parents=True)
    text = "_target_: mgvideo.models.small.slowfast_small\nnum_classes: ${dataset.num_classes}\nwidth: 12\n"
    (folder / "model/mine.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    "flag", ["--config-dir {}", "--config-dir={}", "--config-d {}", "-cd {}", "hydra.searchpath=['file://{}']"]
)
def test_config_folders_outside_the_checkout_are_searched(
    flag: str, config_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = flag.partition(" ")
    words = [word.format(config_folder) for word in (name, value) if word]
    main([*words, "model=mine", "base.epochs=40", "--cfg", "job"])
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert cfg.model.width == 12
    assert list(cfg.base.lr_milestones) == [24, 36], "the recipe still scales with base.epochs"


@pytest.mark.parametrize(
    ("defaults", "choice", "lr"),
    [
        ("", [], 0.025),
        ("", ["recipe=kinetics"], 0.1),
        ("defaults: [_self_, override /recipe@_global_.recipe: charades]\n", [], 0.0375),
        ("defaults: [_self_, override /recipe@_global_.recipe: charades]\n", ["recipe=mine"], 7),
    ],
)
def test_a_dataset_outside_the_checkout_has_the_default_recipe_or_names_another(
    defaults: str, choice: list[str], lr: float, config_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for group, text in {
        "dataset": f"{defaults}name: mine\ntask: single_label\nnum_classes: 3\nroot: /data\n",
        "recipe": "# @package _global_\ndefaults: [finetune, _self_]\nbase: {lr: 7}\n",
    }.items():
        (config_folder / group).mkdir()
        (config_folder / group / "mine.yaml").write_text(text)
    main(["--config-dir", str(config_folder), "dataset=mine", *choice, "--cfg", "job"])
    assert OmegaConf.create(capsys.readouterr().out).base.lr == lr


def test_the_same_command_searches_the_same_config_folder(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search_path = f"hydra.searchpath=['file://{config_folder}']"
    monkeypatch.setattr(HydraConfig, "get", lambda: compose_config("run", [search_path, "model=mine"]).hydra)
    words = shlex.split(same_command({"base.lr": "0.05"}))
    assert words[-3:] == [search_path, "model=mine", "base.lr=0.05"]


def test_invalid_config_folders_are_one_line(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in error_line(main, ["--config-dir", "/nowhere"], capsys)
    both = ["--config-dir", str(config_folder), "hydra.searchpath=[/nowhere]"]
    assert "not both" in error_line(main, both, capsys)
