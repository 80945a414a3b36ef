"""`mgvideo from_pyslowfast`: configs of PySlowFast become commands that compose to the same values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from pyslowfast_configs import CHARADES, I3D_NLN, KINETICS, MVITV2_S, X3D_M
from refusals import error_line

from mgvideo.cli import app, pyslowfast_page
from mgvideo.cli.from_pyslowfast import main
from mgvideo.cli.pyslowfast_keys import RULES, find_rule


class Translated:
    """What the program prints for a config."""

    def __init__(self, output: str) -> None:
        self.output = " ".join(output.split())
        self.command = shlex.split(output.partition("\n")[0])
        first = next(i for i, word in enumerate(self.command) if word.startswith("model="))
        self.launcher, self.overrides = self.command[:first], self.command[first:]

    @property
    def cfg(self) -> DictConfig:
        """The config that the printed command composes."""
        return app.compose_config("run", self.overrides)


@pytest.fixture
def translate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(config: str, *words: str) -> Translated:
        file = tmp_path / "config.yaml"
        file.write_text(config)
        main([str(file), *words])
        return Translated(capsys.readouterr().out)

    return run


def differences(first: DictConfig, second: DictConfig) -> set[str]:
    """Return the keys of a run in which two configs differ."""
    sections = ("model", "dataset", "schedule", "optimizer", "base", "train", "test", "normalize", "seed", "init_from")
    flat = [
        {
            key: OmegaConf.select(cfg, key)
            for key in app.flat_keys(cfg)
            if key.split(".")[0] in sections and not key.endswith("root")
        }
        for cfg in (first, second)
    ]
    keys = {key for key in flat[0].keys() | flat[1].keys() if not OmegaConf.is_dict(flat[0].get(key))}
    return {key for key in keys if flat[0].get(key) != flat[1].get(key)}


def test_kinetics_config_is_our_experiment_but_for_its_test_and_its_norms(translate: Any) -> None:
    translated = translate(KINETICS)
    cfg = translated.cfg
    experiment = app.compose_config("run", ["experiment=kinetics/slowfast_8x8_r50"])
    assert differences(cfg, experiment) == {
        "test.crop_size", "optimizer.decay_norm_and_bias", "train.evals_per_phase",
    }  # fmt: skip
    assert (cfg.test.crop_size, cfg.optimizer.decay_norm_and_bias, cfg.train.evals_per_phase) == (224, False, 3)
    assert cfg.hydra.runtime.choices.schedule == "multigrid"
    assert translated.launcher == ["torchrun", "--nproc-per-node=8", *translated.launcher[2:]]
    assert "replace FOLDER" in translated.output
    assert "TRAIN.CHECKPOINT_PERIOD: has no effect here, because" in translated.output


def test_charades_config_is_our_experiment_with_its_weights_and_batch_norm_over_8_clips(translate: Any) -> None:
    translated = translate(CHARADES, "DATA.PATH_TO_DATA_DIR", "/data/charades", "DATA.PATH_PREFIX", "/data/frames")
    cfg = translated.cfg
    experiment = app.compose_config("run", ["experiment=charades/slowfast_16x8_r50"])
    assert differences(cfg, experiment) == {
        "init_from", "optimizer.decay_norm_and_bias", "train.evals_per_phase", "test.batch_size",
        *(f"dataset.{split}.{key}" for split in ("train", "val") for key in ("annotations", "videos")),
    }  # fmt: skip
    assert cfg.init_from == "SLOWFAST_8x8_R50.pkl"
    assert cfg.schedule.bn_group == 8
    assert (cfg.dataset.root, cfg.dataset.train.annotations) == ("/data/charades", "train.csv")
    assert cfg.dataset.val.videos == "/data/frames"
    assert "training starts at epoch 0" in translated.output


SSV2 = [
    *("TRAIN.DATASET", "ssv2", "TEST.DATASET", "ssv2", "MODEL.NUM_CLASSES", "174", "TRAIN.BATCH_SIZE", "16"),
    *(
        "DATA.NUM_FRAMES",
        "64",
        "DATA.RANDOM_FLIP",
        "False",
        "DATA.INV_UNIFORM_SAMPLE",
        "True",
        "SOLVER.BASE_LR",
        "0.03",
    ),
    *("SOLVER.STEPS", "[0, 14, 18]", "SOLVER.MAX_EPOCH", "22", "SOLVER.WEIGHT_DECAY", "1e-6"),
    *("SOLVER.WARMUP_EPOCHS", "0.19", "SOLVER.WARMUP_START_LR", "0.0001"),
    *("TEST.NUM_ENSEMBLE_VIEWS", "1", "TEST.NUM_SPATIAL_CROPS", "1", "DATA.PATH_PREFIX", "/frames"),
]


def test_something_something_is_our_experiment_but_for_its_views(translate: Any) -> None:
    translated = translate(KINETICS, *SSV2)
    experiment = app.compose_config("run", ["experiment=ssv2/slowfast_16x8_r50"])
    assert differences(translated.cfg, experiment) == {
        "test.crop_size", "test.num_crops", "optimizer.decay_norm_and_bias", "train.evals_per_phase",
    }  # fmt: skip
    assert (
        "DATA.INV_UNIFORM_SAMPLE: not there, because this dataset draws the short side uniformly" in translated.output
    )
    assert "DATA.PATH_PREFIX: not there, because Something-Something is read from its videos" in translated.output


def test_i3d_nln_config_trains_with_its_cosine(translate: Any) -> None:
    translated = translate(I3D_NLN)
    cfg = translated.cfg
    assert translated.overrides[:3] == ["model=i3d_nln_r50", "dataset=kinetics400", "schedule=baseline"]
    assert (cfg.base.num_frames, cfg.base.frame_stride, cfg.base.batch_size, cfg.base.lr) == (8, 8, 64, 0.1)
    assert (cfg.base.lr_policy, cfg.base.epochs, cfg.base.warmup_epochs, cfg.base.warmup_lr) == (
        "cosine",
        196,
        34,
        0.01,
    )
    assert (cfg.base.lr_milestones, cfg.optimizer.weight_decay, cfg.schedule.bn_group) == ([], 1e-4, 8)
    assert cfg.train.evals_per_phase == 20  # 196 epochs in one phase, validated every 10
    assert not any(word.startswith("model.") for word in translated.overrides)


AUGMENTATION = [
    *("AUG.ENABLE", "True", "AUG.NUM_SAMPLE", "2", "AUG.AA_TYPE", "rand-m7-n4-mstd0.5-inc1", "MIXUP.ENABLE", "True"),
    *("DATA.TRAIN_JITTER_SCALES_RELATIVE", "[0.08, 1.0]", "DATA.TRAIN_JITTER_ASPECT_RELATIVE", "[0.75, 1.3333]"),
    *("MODEL.LOSS_FUNC", "soft_cross_entropy"),
]


def test_the_augmentation_of_mvit_is_our_strong_one(translate: Any) -> None:
    cfg = translate(KINETICS, *AUGMENTATION).cfg
    strong = app.compose_config("run", ["augment=strong"])
    assert cfg.augment == strong.augment
    assert cfg.train.label_smoothing == strong.train.label_smoothing == 0.1
    assert cfg.base.batch_size == 128, "two clips of each of 64 videos"
    assert "MODEL.LOSS_FUNC" not in translate(KINETICS, *AUGMENTATION).output
    other = translate(KINETICS, "AUG.ENABLE", "True", "AUG.AA_TYPE", "augmix-m3", "AUG.RE_MODE", "const")
    assert other.cfg.augment.randaugment_ops == 0
    assert "AUG.AA_TYPE: not there, because there is RandAugment" in other.output
    assert "AUG.RE_MODE: not there, because an erased part is noise" in other.output


@pytest.mark.parametrize(("config", "network"), [(X3D_M, "x3d"), (MVITV2_S, "mvit")])
def test_networks_that_are_not_translated_are_one_line_after_a_list_of_what_exists(
    config: str, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "config.yaml")])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.count("\n") == 1
    option = {"x3d": "x3d_xs", "mvit": "mvit_v1_b"}[network]
    assert f"MODEL.ARCH={network}: configs of this network are not translated yet: choose model={option}" in err
    assert "tools/run_net.py" not in out
    settings = yaml.safe_load(config)
    assert f"base.batch_size={128 if network == 'x3d' else 32}" in out  # MViT: two samples of each video
    assert f"base.num_frames={settings['DATA']['NUM_FRAMES']}" in out
    solver = ("optimizer=adamw", "train.clip_grad_norm=1.0", "base.cosine_after_warmup=true", "base.final_lr=1e-06")
    assert network == "x3d" or all(word in out for word in solver)
    block = {"x3d": "X3D.WIDTH_FACTOR", "mvit": "MVIT.EMBED_DIM"}[network]
    assert block in " ".join(out.split()).partition("Not translated")[2]


def test_every_key_is_translated_or_has_a_reason(translate: Any) -> None:
    for config in (KINETICS, CHARADES, I3D_NLN):
        translated = translate(config)
        for block, keys in yaml.safe_load(config).items():
            for key in (f"{block}.{name}" for name in keys) if isinstance(keys, dict) else [block]:
                rule = find_rule(key)
                assert rule is not None, key
                if rule.text.startswith("has no effect"):
                    assert key in translated.output


OVERRIDES = [
    (["MULTIGRID.LONG_CYCLE", "False"],
     {"schedule.name": "short", "base.lr_milestones": [94, 154, 196], "base.gamma": 0.1}),
    (["MULTIGRID.SHORT_CYCLE", "False"], {"schedule.name": "long", "schedule.epoch_factor": 1.5}),
    (["MULTIGRID.EPOCH_FACTOR", "2.0", "MULTIGRID.BN_BASE_SIZE", "4"],
     {"schedule.epoch_factor": 2.0, "schedule.bn_group": 4}),
    (["MULTIGRID.LONG_CYCLE_FACTORS", "[(0.5, 0.5), (1, 1)]"], {"schedule.long_factors": [[0.5, 0.5], [1, 1]]}),
    (["TRAIN.BATCH_SIZE", "32"], {"base.batch_size": 32, "base.lr": 0.1, "train.precise_bn_clips": 6400}),
    (["SOLVER.MAX_EPOCH", "250"], {"base.epochs": 250, "base.lr_milestones": [94, 154, 196], "base.warmup_epochs": 34}),
    (["SOLVER.NESTEROV", "False", "SOLVER.WEIGHT_DECAY", "1e-5"],
     {"optimizer.nesterov": False, "optimizer.weight_decay": 1e-5}),
    (["SOLVER.OPTIMIZING_METHOD", "adamw", "SOLVER.BETAS", "[0.9, 0.95]", "SOLVER.CLIP_GRAD_L2NORM", "1.0"],
     {"optimizer._target_": "mgvideo.engine.optimizers.adamw", "optimizer.betas": [0.9, 0.95],
      "schedule.lr_scaling": "linear", "train.clip_grad_norm": 1.0}),
    (["BN.WEIGHT_DECAY", "1e-4"], {"optimizer.decay_norm_and_bias": True}),
    (["DATA.MEAN", "[0.5, 0.4, 0.3]"], {"normalize.mean": [0.5, 0.4, 0.3]}),
    (["DATA.PATH_TO_DATA_DIR", "/lists", "DATA.PATH_PREFIX", "/videos"],
     {"dataset.root": "/videos", "dataset.train.list_file": "/lists/train.csv",
      "dataset.val.list_file": "/lists/val.csv"}),
    (["DATA.PATH_TO_DATA_DIR", "/data/a=b, c"], {"dataset.root": "/data/a=b, c"}),
    (["MODEL.NUM_CLASSES", "600"], {"dataset.name": "kinetics600", "dataset.num_classes": 600}),
    (["MODEL.NUM_CLASSES", "12"], {"dataset.name": "kinetics400", "dataset.num_classes": 12}),
    (["RNG_SEED", "3", "OUTPUT_DIR", "out", "LOG_PERIOD", "5"], {"seed": 3, "output_dir": "out", "train.log_every": 5}),
    (["TRAIN.AUTO_RESUME", "False", "TRAIN.MIXED_PRECISION", "False"], {"resume": "never", "precision": "fp32"}),
    (["TRAIN.ENABLE", "False", "TEST.CHECKPOINT_FILE_PATH", "w.pyth"], {"train.enable": False, "init_from": "w.pyth"}),
    (["--num_shards", "2", "SOLVER.BASE_LR_SCALE_NUM_SHARDS", "True"], {"base.batch_size": 128, "base.lr": 0.2}),
    (["RESNET.DEPTH", "101", "SLOWFAST.FUSION_KERNEL_SZ", "5"], {"model.depth": 101, "model.temporal_depth": 50}),
    (["SLOWFAST.ALPHA", "8", "SLOWFAST.FUSION_KERNEL_SZ", "5"], {"model.alpha": 8, "model.fusion_kernel": 5}),
    (["MODEL.ARCH", "slow", "DATA.NUM_FRAMES", "4"],
     {"model._target_": "mgvideo.models.i3d.slow", "base.num_frames": 4}),
    (["MODEL.ARCH", "c2d", "RESNET.DEPTH", "101"], {"model._target_": "mgvideo.models.i3d.c2d", "model.depth": 101}),
    (["NONLOCAL.LOCATION", "[[[],[]],[[1,3],[]],[[1,3,5],[]],[[],[]]]"],
     {"model.nonlocal_blocks": {"res3": [1, 3], "res4": [1, 3, 5]}, "model.fusion_kernel": 7}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), OVERRIDES, ids=lambda value: " ".join(value))
def test_overrides_of_the_command_line(words: list[str], expected: dict[str, Any], translate: Any) -> None:
    translated = translate(KINETICS, *words)
    cfg = translated.cfg
    assert {key: OmegaConf.select(cfg, key) for key in expected} == expected
    if "--num_shards" in words:
        assert "--nnodes=2" in translated.launcher
        assert "replace HOST by the name of the first one" in translated.output


def test_networks_are_the_published_ones(translate: Any) -> None:
    chosen = {
        "slowfast_4x16_r50": ["SLOWFAST.ALPHA", "8", "SLOWFAST.FUSION_KERNEL_SZ", "5"],
        "slowfast_16x8_r50": ["DATA.NUM_FRAMES", "64"],
        "slowfast_16x8_r101": ["RESNET.DEPTH", "101", "SLOWFAST.FUSION_KERNEL_SZ", "5", "DATA.NUM_FRAMES", "64"],
        "slow_r50": ["MODEL.ARCH", "slow"],
        "i3d_r50": ["MODEL.ARCH", "i3d"],
        "c2d_r50": ["MODEL.ARCH", "c2d"],
    }
    all_temporal = "[[3,3],[4,4],[23,23],[3,3]]"
    chosen["slowfast_8x8_r101"] = [*chosen["slowfast_16x8_r101"][:4], "RESNET.NUM_BLOCK_TEMP_KERNEL", all_temporal]
    for option, words in chosen.items():
        overrides = translate(KINETICS, *words).overrides
        assert overrides[0] == f"model={option}"
        assert not any(re.match(r"\+?model\.", word) for word in overrides), option


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["TRAIN.BATCHSIZE", "8"], "PySlowFast has no key TRAIN.BATCHSIZE, did you mean TRAIN.BATCH_SIZE?"),
        (["TRAIN.BATCH_SIZE", "many"], "TRAIN.BATCH_SIZE=many: give a number"),
        (["SOLVER.STEPS", "[0, 'a']"], "SOLVER.STEPS=[0, 'a']: give a list of numbers"),
        (["NONLOCAL.LOCATION", "[3]"], "not a value that PySlowFast takes"),
        (["TRAIN.BATCH_SIZE"], "TRAIN.BATCH_SIZE has no value"),
        (["DATA.TRAIN_CROP_SIZE", "320"], "base.short_side"),
        (["RESNET.DEPTH", "18"], "RESNET.DEPTH is 18"),
        (["RESNET.NUM_GROUPS", "32"], "RESNET.NUM_GROUPS=32: not there, because ResNeXt"),
        (["TRAIN.DATASET", "ava"], "TRAIN.DATASET=ava: this dataset is not there"),
        (["DETECTION.ENABLE", "True"], "there is no detection"),
        (["SOLVER.OPTIMIZING_METHOD", "adam"], "the optimizers are sgd, adamw and lamb"),
        (["MULTIGRID.LONG_CYCLE", "False", "SOLVER.LRS", "[1, 0.1, 0.05, 0.01]"], "by the same base.gamma"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(KINETICS)
    assert message in error_line(main, [str(tmp_path / "config.yaml"), *words], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("TRAIN: [1", ":1: not valid YAML"),
        ("- a\n", "expected blocks of keys"),
        ("\x00", "not valid YAML"),
        (None, "No such"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    line = error_line(main, [str(file)], capsys)
    assert str(file) in line
    assert message in line


def test_pyslowfasts_own_flags_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(KINETICS)
    flags = ["--shard_id", "0", "--init_method", "tcp://a:9999"]
    main(["--cfg", str(tmp_path / "config.yaml"), *flags, "--opts", "NUM_GPUS", "1", "TRAIN.BATCH_SIZE", "8"])
    out = capsys.readouterr().out
    assert "torchrun" not in out
    assert " base.batch_size=8 base.lr=0.1 " in out or {"base.batch_size=8", "base.lr=0.1"} <= {*out.split()}


def test_the_committed_page_is_up_to_date() -> None:
    committed = pyslowfast_page.PAGE.read_text(encoding="utf-8")
    assert committed == pyslowfast_page.make_page(committed), "docs/pyslowfast.md differs: run `make docs`"


def test_the_page_shows_what_the_program_prints(translate: Any) -> None:
    words = translate(KINETICS, "DATA.PATH_TO_DATA_DIR", "/data/k400").overrides
    assert f"tools/run_net.py {shlex.join(words)}\n" in pyslowfast_page.PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_key() -> None:
    page = pyslowfast_page.PAGE.read_text(encoding="utf-8")
    assert [key for key in RULES if f"`{key}`" not in page and "*" not in key] == []


def test_target_rate_is_that_of_kinetics(translate: Any) -> None:
    assert translate(KINETICS, "DATA.TARGET_FPS", "25").cfg.sampling.target_fps == 25
    assert translate(KINETICS).cfg.sampling.target_fps == 30
    charades = translate(CHARADES, "DATA.TARGET_FPS", "25")
    assert not any(word.startswith("sampling.") for word in charades.overrides)
    assert "DATA.TARGET_FPS: has no effect, as in PySlowFast, which counts the frames" in charades.output
