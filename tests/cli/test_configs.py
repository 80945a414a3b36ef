"""Every config composes, and what it names can be built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_data, build_plan
from mgvideo.cli.help import group_options
from mgvideo.cli.plan import train_videos
from mgvideo.cli.resume import resume_fingerprint
from mgvideo.engine.precision import choose_precision
from mgvideo.errors import UserError
from mgvideo.storage.checkpoints import describe_differences

OPTIONS = group_options()


def composed(*overrides: str) -> DictConfig:
    return compose_config("run", [*overrides, "output_dir=unused"])


def plain(cfg: DictConfig, name: str) -> DictConfig:
    """One group of a config with everything it refers to resolved."""
    return OmegaConf.create({name: OmegaConf.to_container(cfg[name], resolve=True)})[name]


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_models_instantiate_with_the_classes_of_the_dataset(model: str) -> None:
    with torch.device("meta"):
        network = instantiate(plain(composed(f"model={model}", "dataset=motion"), "model"))
    assert list(network.parameters())[-1].shape == (8,)


@pytest.mark.parametrize("dataset", OPTIONS["dataset"])
def test_datasets_name_their_parts(dataset: str) -> None:
    cfg = composed(f"dataset={dataset}", "++dataset.root=somewhere")
    assert cfg.dataset.task in ("single_label", "multi_label")
    assert 0 < cfg.dataset.max_bad_fraction < 1
    for part in ("train", "val"):
        assert callable(instantiate({"_target_": "hydra.utils.get_method", "path": cfg.dataset[part]._target_}))


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_each_experiment_plans_with_each_schedule(experiment: str, schedule: str) -> None:
    cfg = composed(f"experiment={experiment}", f"schedule={schedule}", "++dataset.root=somewhere")
    plan = build_plan(cfg, 5000)
    assert plan.schedule == schedule
    assert plan.steps > 10
    with torch.device("meta"):
        instantiate(plain(composed(f"experiment={experiment}", "++dataset.num_classes=5"), "model"))


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_each_experiment_plans_without_its_data(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    videos, notes = train_videos(cfg)
    assert build_plan(cfg, videos).steps > 100
    assert bool(notes) == (experiment != "motion")


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize("dataset", ["kinetics400", "charades", "ssv2", "folder", "motion"])
def test_fewer_epochs_need_no_other_key(dataset: str, schedule: str) -> None:
    recipe = composed(f"dataset={dataset}").base
    cfg = composed(f"dataset={dataset}", f"schedule={schedule}", "base.epochs=7")
    assert cfg.base.warmup_epochs == pytest.approx(recipe.warmup_epochs * 7 / recipe.epochs)
    assert list(cfg.base.lr_milestones) == pytest.approx([step * 7 / recipe.epochs for step in recipe.lr_milestones])
    assert build_plan(cfg, 5000).epochs == pytest.approx(
        7 * cfg.schedule.epoch_factor, rel=0.15
    )  # rounded to whole ones


def test_without_a_recipe_nothing_is_scaled() -> None:
    base = composed("~recipe", "base.batch_size=8", "base.epochs=5").base
    assert (base.batch_size, base.epochs, list(base.lr_milestones)) == (8, 5, [])
    assert OmegaConf.is_missing(base, "lr")


def test_cfg_job_prints_the_scaled_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_net.py"])
    app.main("run", "", lambda _: None, ["--cfg", "job", "base.epochs=10", "base.batch_size=32"])
    printed = OmegaConf.create(capsys.readouterr().out).base
    assert (printed.lr, list(printed.lr_milestones), printed.warmup_epochs) == (0.1, [6, 9], 1.5)


def test_a_scaled_recipe_is_the_same_as_one_that_is_set(motion_root: str) -> None:
    """A checkpoint's fingerprint holds the recipe as it is scaled."""
    data_keys = [key for key in TINY if key.startswith("dataset.")]
    precision = choose_precision("fp32", torch.device("cpu"))

    def fingerprint(*overrides: str) -> dict[str, Any]:
        cfg = composed(*data_keys, f"dataset.root={motion_root}", *overrides)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return resume_fingerprint(cfg, build_data(cfg), precision)

    scaled = fingerprint("base.epochs=10", "base.batch_size=32")
    by_hand = ["base.lr_milestones=[6,9]", "base.warmup_epochs=1.5", "base.lr=0.1"]
    assert describe_differences(scaled, fingerprint("base.epochs=10", "base.batch_size=32", *by_hand)) == []
    changed = " ".join(describe_differences(scaled, fingerprint("base.epochs=5", "base.batch_size=32")))
    assert all(key in changed for key in ("base.epochs", "base.lr_milestones", "base.warmup_epochs"))


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiments_open_with_command_hardware_and_expectation(experiment: str) -> None:
    import mgvideo.configs

    text = (Path(mgvideo.configs.__file__).parent / "experiment" / f"{experiment}.yaml").read_text()
    comment = "\n".join(line for line in text.splitlines()[1:12] if line.startswith("#"))
    command = "python tools/run_net.py" if experiment == "motion" else f"experiment={experiment}"
    assert command in comment
    assert "Hardware:" in comment
    assert "Expected:" in comment


@pytest.mark.parametrize("group", ["decoder", "optimizer"])
def test_the_other_groups_name_what_exists(group: str) -> None:
    for option in OPTIONS[group]:
        target = composed(f"{group}={option}")[group]._target_
        assert callable(instantiate({"_target_": "hydra.utils.get_method", "path": target}))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("base.batchh=3", "base.batchh is no key of this config, did you mean base.batch_size?"),
        ("model=i3d_r5", "model=i3d_r5 does not exist, did you mean i3d_r50?"),
        ("schedule=multigird", "schedule=multigird does not exist, did you mean multigrid?"),
        ("experiment=motoin", "experiment=motoin does not exist, did you mean motion?"),
        ("base.batch_size=many", "base.batch_size=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("base.batch_size", "cannot read 'base.batch_size': write it as key=value"),
        ("model.widht=8", "model.widht is no key of this config, did you mean model.width?"),
    ],
)
def test_a_wrong_key_or_value_is_answered_with_the_nearest(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        composed(override)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
