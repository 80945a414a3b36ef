"""A run with AdamW, an average of the weights, clipping and frozen parts, and what uses its weights afterwards."""

import json
from pathlib import Path

import pytest
import torch
from training import TINY, metrics

from mgvideo.cli.export import ExportKeys
from mgvideo.cli.run import main
from mgvideo.cli.trained import load_trained
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

OPTIONS = [
    *("optimizer=adamw", "base.lr=1e-3", "base.lr_policy=cosine", "base.cosine_after_warmup=true"),
    *("train.ema=0.9", "train.clip_grad_norm=0.5", "train.freeze=[stem]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    main([*TINY, f"dataset.root={motion_root}", f"output_dir={folder}", "loader.num_workers=0", *OPTIONS])
    return folder


def checkpoint(folder: Path, number: int = -1) -> Path:
    """Return the path of a checkpoint of the run, by default of the last."""
    checkpoints = Checkpoints(folder / "checkpoints")
    return checkpoints.path(checkpoints.steps()[number])


def test_the_average_is_tested_and_exported(folder: Path) -> None:
    assert "moving average" in (folder / "report.md").read_text()
    state, weights = read_checkpoint(checkpoint(folder)), str(checkpoint(folder))
    for key, override in (("model_ema", []), ("model", ["init_from_key=model"])):
        loaded = load_trained(weights, override, ExportKeys).model.state_dict()
        for name, value in loaded.items():
            assert torch.equal(value, state[key][name]), name
    assert not torch.equal(state["model"]["fc.weight"], state["model_ema"]["fc.weight"])


def test_a_test_without_training_uses_the_average(folder: Path, motion_root: str) -> None:
    trained = json.loads((folder / "test.json").read_text())
    alone = ["train.enable=false", f"resume={checkpoint(folder)}", f"output_dir={folder}/alone"]
    main([*TINY, f"dataset.root={motion_root}", "loader.num_workers=0", *OPTIONS, *alone])
    assert json.loads((folder / "alone/test.json").read_text()) == trained


def test_frozen_parts_keep_their_weights_and_the_log_has_the_norm_of_the_gradients(folder: Path) -> None:
    first, last = (read_checkpoint(checkpoint(folder, i))["model"] for i in (0, -1))
    changed = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, last[name])}
    assert "fc" in changed
    assert "stem" not in changed
    norms = metrics(folder, "grad_norm")
    assert norms.keys() == metrics(folder).keys()
    assert all(norm > 0 for norm in norms.values())
