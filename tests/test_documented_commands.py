"""Every command that the README, the docs, comments of configs and the programs show works.

Plans, `--help` and `--list` are run. For commands that take long or require the user's data, the real program composes
the config, with a value for each placeholder. For training commands it also makes the plan.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from documents import SCRIPT, ShownCommand, all_shown_commands
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pyslowfast_configs import KINETICS
from torch.distributed.run import get_args_parser as torchrun_parser
from training import ROOT

from mgvideo import cli
from mgvideo.cli import app, export, features, predict, reproduce, test, trained
from mgvideo.cli.build import build_plan
from mgvideo.cli.groups import check_groups
from mgvideo.cli.jobs import Job, launcher_overrides
from mgvideo.cli.recipe import sample_size
from mgvideo.cli.schema import RunKeys, check_values
from mgvideo.errors import UserError

SHOWN = all_shown_commands()
TOOLS = {
    "run_net": "run", "plan": "plan", "prepare_data": "prepare", "reproduce": "reproduce", "predict": "predict",
    "test": "test", "features": "features", "export": "export", "benchmark": "benchmark", "doctor": "doctor",
    "from_pyslowfast": "from_pyslowfast",
}  # fmt: skip
# programs that are not part of mgvideo → why they are not run
NOT_RUN = {
    "git": "clones from the user's copy",
    "cd": "enters that clone",
    "scancel": "requires a job of the user",
    "scontrol": "requires a job of the user",
    "ffmpeg": "requires a video of the user",
    "docker": "requires an image of the user",
    "export": "sets shell variables",
    "srun": "requires a cluster; tests/slurm has a small one",
    "tensorboard": "is a server, which does not exit",
}
PACKAGES = {"torch-tb-profiler": "a viewer that mgvideo itself does not require"}  # not in any of our extras
PLACEHOLDER_VALUES = {"weights": "placeholder",
    "experiment": "kinetics/slowfast_8x8_r50", "model": "slowfast_small", "dataset": "kinetics400",
    "table": "schedules", "preset": "motion", "benchmark": "measured.json", "out": "out.onnx",
}  # fmt: skip
FIRST_CHOICES = {"COMMAND": "check", "PROGRAM": "run", "NAME": "step", "check|pyramid|list|motion": "check"}


def fill_placeholders(words: Sequence[str]) -> list[str]:
    """Replace the placeholders of a command by values. Placeholders are `…` and words in capitals."""
    filled = []
    for word in words:
        name, is_key, value = word.partition("=")
        if word in FIRST_CHOICES:
            filled.append(FIRST_CHOICES[word])
        elif word == "…" or re.fullmatch(r"\[\S+=\S+\]", word):
            continue
        elif is_key and (not value or "…" in value or re.fullmatch(r"[A-Z]+", value)):
            filled.append(f"{name}={PLACEHOLDER_VALUES.get(name.lstrip('+-'), 'placeholder')}")
        else:
            filled.append(word)
    return filled


def benchmark_json() -> str:
    """Return a benchmark file with every grid of the documented plans."""
    grids = [f"{frames}x{size}" for frames in (4, 8, 16, 32, 64) for size in (32, 45, 64, 112, 158, 224)]
    return json.dumps({"step_seconds": dict.fromkeys(grids, 0.1)})


def write_extensions() -> None:
    """Write the files that docs/extending.md shows into the current folder, where its commands look for them."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"^`(my_parts/[\w./]+)`:\n\n```\w+\n(.*?)^```", page, re.M | re.S):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


compose_once = cache(app.compose_config)


@cache
def composed(*overrides: str) -> DictConfig:
    """Compose the config of a run, check it and make its plan, as the run does."""
    cfg = app.compose_config("run", overrides)
    check_values(cfg)
    check_groups(cfg)
    if cfg.schedule.get("decay_from") == "now":
        return cfg  # the plan depends on the checkpoint of resume
    build_plan(cfg, sample_size(cfg, cfg.dataset.get("train_videos") or 0))
    return cfg


def compose_run(arguments: Sequence[str]) -> None:
    """Compose the configs that `mgvideo run` would train, one for each run of a sweep."""
    flags = get_args_parser().parse_args(list(arguments))
    jobs = [flags.overrides]
    if flags.multirun:
        parsed = OverridesParser.create().parse_overrides(flags.overrides)
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    for overrides in jobs:
        composed(*overrides)


def compose_trained(ckpt: str, overrides: Sequence[str], own: type) -> None:
    """Compose the recipe of a checkpoint: the recipe in its run folder, or the one of the named network."""
    if ckpt.startswith(("runs/", "hf://")) or ckpt == "placeholder":
        cfg = OmegaConf.masked_copy(composed("output_dir=unused"), [f.name for f in fields(RunKeys)])
        Path("config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        check_values(trained.run_config(Path("config.yaml"), overrides, own))
    else:
        check_values(trained.config_for_weights(ckpt, overrides))


def compose_cell(reproduction: reproduce.Reproduction) -> bool:
    """Compose a cell of a table; all of them are composed in tests/cli/test_reproduce.py."""
    entry = next((entry for entry in reproduction.entries if entry.skip_reason is None), reproduction.entries[0])
    composed(*entry.overrides, "output_dir=unused")
    if reproduction.options.launcher:
        launcher_overrides(
            Job(entry, 0, Path(), reproduction.table.preset.processes),
            reproduction.options.launcher,
            reproduction.queue,
        )
    return False


def compose_soak(arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Compose the runs that tools/soak.py would kill."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "tools/soak.py")
    assert spec
    assert spec.loader
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)

    def run(arguments: Sequence[str], *_: object) -> tuple[int, float, int]:
        compose_run(arguments)
        raise InterruptedError

    patch.setattr(soak, "run_program", run)
    patch.setattr(soak, "make_bad_videos", lambda *_: 0)
    patch.setattr("sys.argv", ["soak.py", *arguments])
    with pytest.raises(InterruptedError):
        soak.main()


def pip_install(words: Sequence[str]) -> None:
    """Check that the extras exist, and that the packages belong to an extra."""
    declared = re.search(r"extras_require=(\{.*?\n    \})", (ROOT / "setup.py").read_text(), re.S)
    assert declared
    extras = eval(declared[1])
    ours = {re.split(r"[\[<>=]", package)[0] for packages in extras.values() for package in packages}
    for word in words:
        if word.startswith("-") or word == ".":
            continue
        extra = re.fullmatch(r"(?:\.|mgvideo)\[([\w,]+)\]", word)
        if extra:
            assert {*extra[1].split(",")} <= extras.keys(), word
        else:
            assert word in ours | PACKAGES.keys(), word


def make(words: Sequence[str]) -> None:
    """Check that the targets and the variables exist in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert (rf"$({name})" if is_variable else f"\n{name}:") in makefile, word


class Programs:
    """Runs our programs with their real argument parsing. Only plans, `--help` and lists run to the end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(app, "compose_config", lambda name, overrides: deepcopy(compose_once(name, tuple(overrides))))
        patch.setattr(export, "run", lambda given, rest: compose_trained(given.ckpt, rest, export.ExportKeys))
        patch.setattr(predict, "run", lambda given, _, rest: compose_trained(given.ckpt, rest, predict.PredictKeys))
        patch.setattr(features, "run", lambda given, _, rest: compose_trained(given.ckpt, rest, features.FeatureKeys))
        patch.setattr(test, "run", lambda given, rest: compose_trained(given.weights, rest, test.Keys))
        patch.setattr(reproduce.Reproduction, "run", compose_cell)

    def __call__(self, program: str, arguments: Sequence[str]) -> None:
        """Run or compose `mgvideo PROGRAM …`."""
        if not arguments and program != "run":  # the text only names the program
            arguments = ["--help"]
        with self.patch.context() as patch:
            if program == "plan":
                arguments = [word for word in arguments if not word.startswith("dataset.root=")]
            elif not {"-h", "--help"} & set(arguments):
                patch.setattr(app, "main", lambda *given: compose_run(given[3]))
            module = importlib.import_module(f"mgvideo.cli.{program}")
            module.main(list(arguments))


def perform(command: str, programs: Programs) -> None:
    """Run or compose one command. Fails if it can do neither."""
    if "launcher=slurm" in command:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    if ".onnx" in command:
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
    if "format=hub" in command:
        pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    for part in re.split(r"\s+&&\s+", command):
        words = shlex.split(part, comments=True)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        _perform(fill_placeholders(words), programs)


def _perform(words: list[str], programs: Programs) -> None:
    first, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if first in ("python", "python3") and rest[0] == "-m":
        if rest[1] != "venv":
            assert importlib.util.find_spec(rest[1]), rest[1]
    elif first in ("python", "python3"):
        _perform(rest, programs)
    elif first == "tools/soak.py":
        compose_soak(rest, programs.patch)
    elif re.fullmatch(r"tools/\w+\.py", first):
        assert (ROOT / first).exists(), first
        programs(TOOLS[Path(first).stem], rest)
    elif first == "mgvideo":
        assert rest[0] in cli.PROGRAMS, rest[0]
        programs(rest[0], rest[1:])
    elif first == "torchrun":
        scriptless = all(word.startswith("-") for word in rest)  # the text shows only flags
        parsed = torchrun_parser().parse_args([*rest, *["tools/run_net.py"] * scriptless])
        _perform([parsed.training_script, *parsed.training_script_args], programs)
    elif first == "sbatch":
        script = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        assert ROOT / rest[script] == SCRIPT
        programs("run", rest[script + 1 :])
    elif first == "make":
        make(rest)
    elif first == "pip":
        assert rest[0] == "install"
        pip_install(rest[1:])
    else:
        assert first in NOT_RUN, f"can neither run nor compose {first}"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.chdir(tmp_path)
    for name in ("measured.json", "slowfast_small.json", "mvit_small.json"):
        Path(name).write_text(benchmark_json())
    Path("SLOWFAST_8x8_R50_stepwise_multigrid.yaml").write_text(KINETICS)
    write_extensions()
    monkeypatch.syspath_prepend("my_parts")  # the page sets PYTHONPATH
    return Programs(monkeypatch)


@pytest.mark.parametrize("command", SHOWN, ids=lambda shown: f"{shown.where}: {shown.text}")
def test_shown_command_works(command: ShownCommand, programs: Programs) -> None:
    perform(command.text, programs)


@pytest.mark.parametrize(
    "command",
    [
        "python tools/plan.py experiment=kinetics/slowfast_8x8",
        "python tools/run_net.py dataset=kinetics400 base.batches=8",
        "python tools/run_net.py precision=fp8",
        "torchrun --processes=8 tools/run_net.py model=i3d_r50",
        "sbatch --nodes=4 tools/slurm/train.sbatch model=i3d",
        "python tools/run_net.py --multirun schedule=baseline,coarse",
        "python tools/reproduce.py table=schedules cells=[best]",
        "python tools/predict.py clip.mp4 ckpt=runs/motion/first clip=3",
        "python tools/export.py ckpt=runs/motion/first out=network.tflite",
        "python tools/prepare_data.py pyramid dataset=kinetics400 dataset.root=/data",
        "python tools/benchmark.py steps",
        "python tools/soak.py --kills 3 model=none",
        "mgvideo train",
        "make everything",
        "pip install 'mgvideo[all]'",
        "kubectl apply -f train.yaml",
    ],
)
def test_wrong_command_fails(command: str, programs: Programs) -> None:
    with pytest.raises((SystemExit, UserError, AssertionError)):
        perform(command, programs)


def test_commands_are_found_in_all_kinds_of_places() -> None:
    first_words = {(shown.where, shown.text.split()[0]) for shown in SHOWN}
    assert first_words >= {
        ("README.md", "torchrun"),
        ("docs/slurm.md", "sbatch"),
        ("docs/benchmarks/speed.md", "tools/benchmark.py"),
        ("configs/launcher/slurm.yaml", "python"),
        ("tools/slurm/train.sbatch", "sbatch"),
        ("mgvideo/cli/prepare.py", "mgvideo"),
    }
