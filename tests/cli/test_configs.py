"""Every config composes, and its targets can be built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_data, build_plan, published_clip_warning
from mgvideo.cli.help import group_options
from mgvideo.cli.plan import train_videos
from mgvideo.cli.resume import resume_fingerprint
from mgvideo.engine.precision import choose_precision
from mgvideo.errors import UserError
from mgvideo.storage.checkpoints import describe_differences

OPTIONS = group_options()


def compose_run(*overrides: str) -> DictConfig:
    return compose_config("run", [*overrides, "output_dir=unused"])


def resolve_group(cfg: DictConfig, name: str) -> DictConfig:
    """Return one group of a config with all interpolations resolved."""
    return OmegaConf.create({name: OmegaConf.to_container(cfg[name], resolve=True)})[name]


def run_keys(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys of a composed run, without those of Hydra and the output folder."""
    keys: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    return keys | {"output_dir": None}


@pytest.mark.parametrize(
    ("groups", "experiment"),
    [
        ([], "motion"),
        (["model=slowfast_8x8_r50", "dataset=kinetics400"], "kinetics/slowfast_8x8_r50"),
        (["model=slowfast_16x8_r50", "dataset=charades"], "charades/slowfast_16x8_r50"),
        (["dataset=ssv2", "model=slowfast_16x8_r50"], "ssv2/slowfast_16x8_r50"),
    ],
)
def test_groups_alone_inherit_no_values_of_another_experiment(groups: list[str], experiment: str) -> None:
    cfg = compose_run(*groups)
    assert cfg.hydra.runtime.choices.experiment is None
    assert run_keys(cfg) == run_keys(compose_run(f"experiment={experiment}"))


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "runs/motion/slowfast_small_multigrid_seed0"),
        (["~experiment"], "runs/motion/slowfast_small_multigrid_seed0"),
        (["dataset=ucf101", "model=i3d_r50", "schedule=long", "seed=3"], "runs/ucf101/i3d_r50_long_seed3"),
        (["experiment=kinetics/slow_r50"], "runs/kinetics400/kinetics-slow_r50/slow_r50_multigrid_seed0"),
    ],
)
def test_default_output_folder_names_the_experiment(overrides: list[str], folder: str) -> None:
    cfg = compose_config("run", overrides)
    HydraConfig.instance().set_config(cfg)
    assert cfg.output_dir == folder


RECIPES = {
    "kinetics400": "kinetics", "kinetics600": "kinetics", "kinetics700": "kinetics", "charades": "charades",
    "ssv2": "ssv2", "motion": "motion", "camera": "camera", "ucf101": "finetune", "hmdb51": "finetune",
    "folder": "folder", "shards": "folder",
}  # fmt: skip


@pytest.mark.parametrize("dataset", OPTIONS["dataset"])
def test_dataset_chooses_its_recipe_and_the_command_another(dataset: str) -> None:
    cfg = compose_run(f"dataset={dataset}")
    assert cfg.hydra.runtime.choices.recipe == RECIPES[dataset]
    for choice in (["recipe=ssv2", f"dataset={dataset}"], [f"dataset={dataset}", "recipe=ssv2"]):
        assert compose_run(*choice).base == compose_run("dataset=ssv2").base


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_model_has_the_number_of_classes_of_the_dataset(model: str) -> None:
    with torch.device("meta"):
        network = instantiate(resolve_group(compose_run(f"model={model}", "dataset=motion"), "model"))
    assert list(network.parameters())[-1].shape == (8,)


@pytest.mark.parametrize("dataset", OPTIONS["dataset"])
def test_dataset_has_a_task_and_splits_that_can_be_built(dataset: str) -> None:
    cfg = compose_run(f"dataset={dataset}", "++dataset.root=somewhere")
    assert cfg.dataset.task in ("single_label", "multi_label")
    assert 0 < cfg.dataset.max_bad_fraction < 1
    for split in ("train", "val"):
        assert callable(instantiate({"_target_": "hydra.utils.get_method", "path": cfg.dataset[split]._target_}))


TORCHVISION_MEAN, TORCHVISION_STD = [0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989]


@pytest.mark.parametrize(
    ("overrides", "mean", "std"),
    [
        (["model=r2plus1d_18", "dataset=ucf101"], TORCHVISION_MEAN, TORCHVISION_STD),
        (["dataset=ucf101", "model=r2plus1d_18", "normalize.mean=[0.1,0.2,0.3]"], [0.1, 0.2, 0.3], TORCHVISION_STD),
        (["experiment=kinetics/r2plus1d_18"], TORCHVISION_MEAN, TORCHVISION_STD),
        (["experiment=kinetics/r2plus1d_18", "model=i3d_r50"], [0.45] * 3, [0.225] * 3),
        (["model=r2plus1d_small", "dataset=ucf101"], [0.45] * 3, [0.225] * 3),
    ],
)
def test_model_sets_the_normalisation_of_its_weights(overrides: list[str], mean: list[float], std: list[float]) -> None:
    normalize = compose_run(*overrides).normalize
    assert (normalize.mean, normalize.std) == (mean, std)


@pytest.mark.parametrize(
    ("overrides", "settings", "kept"),
    [
        (["model=slowfast_8x8_r50"], "", ""),
        (["model=slow_r50"], "base.num_frames=8 base.frame_stride=8", "base.num_frames=32 base.frame_stride=2"),
        (["model=slow_r50", "base.num_frames=16"], "base.frame_stride=8", "base.frame_stride=2"),
        (["model=slow_r50", "base.num_frames=16", "base.frame_stride=4"], "", ""),
        (["model=slow_r50", "dataset=ssv2"], "base.num_frames=8", "base.num_frames=64"),
        (["model=slowfast_small"], "", ""),
        (["experiment=kinetics/i3d_r50"], "", ""),
        (["experiment=charades/slowfast_16x8_r50"], "", ""),
    ],
)
def test_warning_names_the_clips_of_the_published_weights(overrides: list[str], settings: str, kept: str) -> None:
    data = [] if "experiment=" in overrides[0] else ["dataset=kinetics400"]
    warning = published_clip_warning(compose_run(*data, *overrides), {word.split("=")[0] for word in overrides})
    if not settings:
        assert warning is None
    else:
        assert warning is not None
        assert f" set {settings}; {kept} keeps" in warning


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiment_makes_a_plan_with_each_schedule(experiment: str, schedule: str) -> None:
    cfg = compose_run(f"experiment={experiment}", f"schedule={schedule}", "++dataset.root=somewhere")
    plan = build_plan(cfg, 5000)
    assert plan.schedule == schedule
    assert plan.steps > 10
    with torch.device("meta"):
        instantiate(resolve_group(compose_run(f"experiment={experiment}", "++dataset.num_classes=5"), "model"))


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiment_makes_a_plan_without_its_data(experiment: str) -> None:
    cfg = compose_run(f"experiment={experiment}")
    if experiment.startswith("folder/"):  # nobody knows the number of its videos
        assert build_plan(cfg, 1000).steps > 100
        return
    videos, notes = train_videos(cfg)
    assert build_plan(cfg, videos).steps > 100
    assert bool(notes) == (experiment != "motion")


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize("dataset", ["kinetics400", "charades", "ssv2", "ucf101", "motion"])
def test_epochs_scale_milestones_and_warmup(dataset: str, schedule: str) -> None:
    recipe = compose_run(f"dataset={dataset}").base
    cfg = compose_run(f"dataset={dataset}", f"schedule={schedule}", "base.epochs=7")
    assert cfg.base.warmup_epochs == pytest.approx(recipe.warmup_epochs * 7 / recipe.epochs)
    assert list(cfg.base.lr_milestones) == pytest.approx([epoch * 7 / recipe.epochs for epoch in recipe.lr_milestones])
    assert build_plan(cfg, 5000).epochs == pytest.approx(
        7 * cfg.schedule.epoch_factor, rel=0.15
    )  # phases end on whole epochs


def test_nothing_is_scaled_without_a_recipe() -> None:
    base = compose_run("~recipe", "base.batch_size=8", "base.epochs=5").base
    assert (base.batch_size, base.epochs, list(base.lr_milestones)) == (8, 5, [])
    assert OmegaConf.is_missing(base, "lr")


def test_cfg_job_prints_the_scaled_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_net.py"])
    app.main("run", "", lambda _: None, ["--cfg", "job", "base.epochs=10", "base.batch_size=32"])
    printed = OmegaConf.create(capsys.readouterr().out).base
    assert (printed.lr, list(printed.lr_milestones), printed.warmup_epochs) == (0.1, [6, 9], 1.5)


def test_scaled_recipe_has_the_fingerprint_of_an_explicit_one(motion_root: str) -> None:
    """The resume fingerprint contains the scaled values."""
    data_keys = [key for key in TINY if key.startswith("dataset.")]
    precision = choose_precision("fp32", torch.device("cpu"))

    def fingerprint(*overrides: str) -> dict[str, Any]:
        cfg = compose_run(*data_keys, f"dataset.root={motion_root}", *overrides)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return resume_fingerprint(cfg, build_data(cfg), precision)

    scaled = fingerprint("base.epochs=10", "base.batch_size=32")
    explicit = ["base.lr_milestones=[6,9]", "base.warmup_epochs=1.5", "base.lr=0.1"]
    assert describe_differences(scaled, fingerprint("base.epochs=10", "base.batch_size=32", *explicit)) == []
    changed = " ".join(describe_differences(scaled, fingerprint("base.epochs=5", "base.batch_size=32")))
    assert all(key in changed for key in ("base.epochs", "base.lr_milestones", "base.warmup_epochs"))
    plain, checkpointed = fingerprint("model=x3d_small"), fingerprint("model=x3d_small", "model.checkpointing=true")
    assert describe_differences(plain, checkpointed) == []


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiment_starts_with_its_command_hardware_and_expected_result(experiment: str) -> None:
    import mgvideo.configs

    text = (Path(mgvideo.configs.__file__).parent / "experiment" / f"{experiment}.yaml").read_text()
    comment = "\n".join(line for line in text.splitlines()[1:12] if line.startswith("#"))
    command = "python tools/run_net.py" if experiment == "motion" else f"experiment={experiment}"
    assert command in comment
    assert "Hardware:" in comment
    assert "Expected:" in comment


@pytest.mark.parametrize("group", ["decoder", "optimizer"])
def test_targets_of_decoders_and_optimizers_exist(group: str) -> None:
    for option in OPTIONS[group]:
        target = compose_run(f"{group}={option}")[group]._target_
        assert callable(instantiate({"_target_": "hydra.utils.get_method", "path": target}))


@pytest.mark.parametrize(
    ("override", "start_of_line"),
    [
        ("base.batchh=3", "base.batchh is not a key of this config, did you mean base.batch_size?"),
        ("model=i3d_r5", "model=i3d_r5 does not exist, did you mean i3d_r50?"),
        ("schedule=multigird", "schedule=multigird does not exist, did you mean multigrid?"),
        ("experiment=motoin", "experiment=motoin does not exist, did you mean motion?"),
        ("base.batch_size=many", "base.batch_size=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("base.batch_size", "cannot read 'base.batch_size': write it as key=value"),
        ("model.widht=8", "model.widht is not a key of this config, did you mean model.width?"),
    ],
)
def test_error_suggests_the_nearest_key_or_option(override: str, start_of_line: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run(override)
    assert str(caught.value).startswith(start_of_line)
    assert "\n" not in str(caught.value)
