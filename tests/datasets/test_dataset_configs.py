"""Test the dataset and decoder configs, composed and instantiated like the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from videos import DECORD, write_video

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import build_data
from mgvideo.datasets.decoders import Decord, PyAV
from mgvideo.datasets.motion import Knobs
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid

GRID = Grid(4, 32, (2, 2), (32, 40))


def composed(*overrides: str) -> Any:
    return compose_config("run", overrides)


@pytest.mark.parametrize(("name", "classes"), [("kinetics400", 400), ("kinetics600", 600), ("kinetics700", 700)])
def test_kinetics_reads_its_lists(tmp_path: Path, name: str, classes: int) -> None:
    write_video(tmp_path / "a.mp4", frames=8)
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"a.mp4 {classes - 1}\n")
    cfg = composed(f"dataset={name}", f"dataset.root={tmp_path}", "decoder=pyav").dataset
    dataset = instantiate(cfg.val, decoder=PyAV())
    assert (cfg.name, cfg.task, cfg.num_classes) == (name, "single_label", classes)
    assert (len(dataset), len(dataset.class_names)) == (1, classes)
    assert dataset[ClipRequest(0, GRID, 0)].label == classes - 1


@pytest.mark.parametrize(("name", "sampled"), [("charades", "inverse_jitter"), ("ssv2", "segments")])
def test_published_recipes_set_the_sampling(tmp_path: Path, name: str, sampled: str) -> None:
    (tmp_path / "Charades_v1_train.csv").write_text("id,actions\nAAAAA,c001 0 1\n")
    (tmp_path / "something-something-v2-labels.json").write_text('{"Holding something": "0"}')
    (tmp_path / "something-something-v2-train.json").write_text('[{"id": "1", "template": "Holding [something]"}]')
    dataset = instantiate(composed(f"dataset={name}", f"dataset.root={tmp_path}").dataset.train, decoder=PyAV())
    assert len(dataset) == 1
    assert getattr(dataset.sampling, sampled)


@pytest.mark.parametrize(("name", "classes"), [("ucf101", 101), ("hmdb51", 51)])
def test_official_splits_are_chosen_by_fold(tmp_path: Path, name: str, classes: int) -> None:
    cfg = composed(f"dataset={name}", f"dataset.root={tmp_path}", "dataset.fold=2").dataset
    assert (cfg.num_classes, cfg.val.fold, cfg.val.split) == (classes, 2, "val")
    with pytest.raises(InstantiationException, match=r"classInd|split2"):
        instantiate(cfg.val, decoder=PyAV())


def test_folder_config_sets_the_number_of_classes(tmp_path: Path) -> None:
    for name in ("run", "walk"):
        for i in range(5):
            write_video(tmp_path / name / f"{i}.mp4", frames=4)
    cfg = composed("dataset=folder", f"dataset.root={tmp_path}")
    train, val = (instantiate(cfg.dataset[split], decoder=Decord()) for split in ("train", "val"))
    assert cfg.dataset.num_classes is None
    assert (len(train), len(val), train.class_names) == (8, 2, ["run", "walk"])
    assert train[ClipRequest(7, GRID, 0)].clip.shape == (4, 32, 32, 3)


def test_motion_config_has_the_default_knobs(tmp_path: Path) -> None:
    cfg = composed("dataset=motion").dataset
    assert instantiate(cfg.knobs).name == Knobs().name
    small = [f"dataset.root={tmp_path}", "dataset.knobs.train=4", "dataset.knobs.val=2", "dataset.knobs.frames=8"]
    cfg = composed("dataset=motion", *small).dataset
    folder = instantiate(cfg.prepare, processes=1)
    assert folder.parent == tmp_path
    assert len(instantiate(cfg.train, decoder=PyAV())) == 4
    assert len(instantiate(cfg.val, decoder=PyAV())) == 2


@pytest.mark.parametrize("name", [DECORD, "pyav"])
def test_decoder_is_selected_by_name(name: str) -> None:
    kind = {"decord": Decord, "pyav": PyAV}[name]
    assert isinstance(instantiate(composed(f"decoder={name}").decoder), kind)


@pytest.mark.parametrize(
    ("choice", "sampling"),
    [
        ("experiment=kinetics/slowfast_8x8_r50", ("published", 30, False)),
        ("experiment=charades/slowfast_16x8_r50", ("published", 30, False)),
        ("experiment=ssv2/slowfast_16x8_r50", ("published", None, False)),
        ("dataset=motion", ("regular", None, True)),
        ("dataset=folder", ("regular", None, True)),
        ("dataset=ucf101", ("regular", None, True)),
    ],
)
def test_published_recipes_have_the_published_protocol(choice: str, sampling: tuple[Any, ...]) -> None:
    cfg = composed(choice).sampling
    assert (cfg.protocol, cfg.target_fps, cfg.antialias) == sampling


def test_sampling_keys_reach_both_datasets(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=8)
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("a.mp4 0\n")
    cfg = composed("dataset=kinetics400", f"dataset.root={tmp_path}", "sampling.target_fps=25", "dataset.num_classes=1")
    data = build_data(cfg)
    for dataset in (data.train, data.val):
        assert (dataset.sampling.protocol, dataset.sampling.target_fps) == ("published", 25)
    decoders = [dataset.decoder.decoder.decoder for dataset in (data.train, data.val)]  # in FrameFolders, RemoteVideos
    assert [decoder.shrink for decoder in decoders] == [True, False]
