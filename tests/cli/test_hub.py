"""Weights as safetensors, on the Hugging Face Hub and back, with a server on this machine in place of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from refusals import error_line
from torch import nn
from web import serve_hub

from mgvideo.cli import app, export, hub
from mgvideo.cli.export import ExportKeys
from mgvideo.cli.predictor import read_class_names
from mgvideo.cli.schema import RunKeys
from mgvideo.cli.trained import load_trained
from mgvideo.errors import UserError
from mgvideo.models.pretrained import load_pretrained
from mgvideo.models.small import r2plus1d_small
from mgvideo.storage import paths
from mgvideo.storage.checkpoints import Checkpoints

pytest.importorskip("huggingface_hub")
NAMES = ["walk", "run", "jump"]
REPORT = {
    "name": "r2plus1d_small on folder, multigrid", "schedule": "multigrid", "epochs": 3.0, "steps": 7,
    "train_seconds": 60.0, "metrics": {"top1": 90.0, "top5": 100.0}, "chance": 40.0, "views": "10×3", "videos": 50,
    "weights": "/secret/step_7.pt",
    "hardware": "2 CPU cores", "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has tested its last step, 7, which is also its best."""
    torch.manual_seed(0)
    overrides = ["model=r2plus1d_small", "model.width=4", "dataset=kinetics400", "dataset.num_classes=3"]
    overrides += ["dataset.root=/secret/k400", "dataset.pyramid=https://secret/pyramid", "output_dir=/secret/run"]
    cfg = OmegaConf.masked_copy(app.compose_config("run", overrides), [f.name for f in fields(RunKeys)])
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, {"model": r2plus1d_small(3, width=4).state_dict(), "progress": {"step": 7}}, best=True)
    checkpoints.wait()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "test.json").write_text(json.dumps({"step": 7, "top1": 90.0}))
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the repositories on the server, with an empty cache on this machine."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_hub(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield tmp_path / "hub"


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    state, other_state = model.state_dict(), other.state_dict()
    return state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def test_weights_as_safetensors_are_read_back_by_init_from(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.safetensors"
    export.main([f"ckpt={run}", f"out={file}"])
    assert "read again, and equal" in capsys.readouterr().out
    model = r2plus1d_small(3, width=4)
    assert "with names of mgvideo" in load_pretrained(model, file)
    assert same_weights(model, load_trained(str(run), [], ExportKeys).model)


def test_a_folder_for_the_hub_has_a_card_and_no_paths_of_this_machine(run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = tmp_path / "out"
    export.main([f"ckpt={run}", "format=hub", f"out={out}"])
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "config.yaml", "classes.txt", "report.json", "README.md"}
    assert not [path.name for path in out.iterdir() if b"secret" in path.read_bytes()]
    card = ModelCard.load(out / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("video-classification", "mgvideo")
    assert "top1 90.00 %, top5 100.00 % on 50 held-out videos, 10×3 views" in card.text
    assert "of step 7 |" in card.text
    assert "These are the results" not in card.text
    trained = load_trained(str(out), [], ExportKeys)
    assert same_weights(trained.model, load_trained(str(run), [], ExportKeys).model)
    assert read_class_names(None, trained) == NAMES
    assert trained.cfg.dataset.val.root is None
    assert load_trained(str(out), ["dataset.root=/data/k400"], ExportKeys).cfg.dataset.val.root == "/data/k400"
    assert load_trained(str(run), ["dataset.root=/data/k400"], ExportKeys).cfg.dataset.val.root == "/data/k400"


def test_weights_from_elsewhere_are_written_with_the_config_of_their_network(tmp_path: Path) -> None:
    model = r2plus1d_small(5, width=4)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = ["model=r2plus1d_small", "model.width=4", "base.num_frames=8"]
    export.main([f"ckpt={tmp_path / 'weights.pth'}", *network, "format=hub", f"out={tmp_path / 'out'}"])
    trained = load_trained(str(tmp_path / "out"), [], ExportKeys)
    assert same_weights(trained.model, model)
    assert (trained.cfg.base.num_frames, trained.classes) == (8, 5)
    assert "Not measured." in (tmp_path / "out/README.md").read_text()


def test_a_card_says_if_other_weights_or_none_were_tested(run: Path) -> None:
    (run / "test.json").write_text(json.dumps({"step": 9}))
    trained = load_trained(str(run), [], ExportKeys)
    card = hub.model_card(trained, hub.read_report(trained), "org/net")
    assert "results of step 9; the weights here are those of step 7" in card
    assert "ckpt=hf://org/net" in card
    (run / "report.json").unlink()
    assert "Not measured." in hub.model_card(trained, hub.read_report(trained), None)


def test_init_from_and_ckpt_read_the_hub(run: Path, server: Path, tmp_path: Path) -> None:
    export.main([f"ckpt={run}", "format=hub", f"out={server / 'org/net'}"])
    expected = load_trained(str(run), [], ExportKeys).model
    trained = load_trained("hf://org/net", [], ExportKeys)
    assert same_weights(trained.model, expected)
    assert (trained.weights, read_class_names(None, trained)) == ("hf://org/net", NAMES)
    model = r2plus1d_small(3, width=4)
    load_pretrained(model, "hf://org/net@main/model.safetensors")
    assert same_weights(model, expected)
    (server / "org/net/config.yaml").unlink()
    (tmp_path / "cache").rename(tmp_path / "old_cache")
    with pytest.raises(UserError, match="hf://org/net is not in a run's folder: add its network"):
        load_trained("hf://org/net", [], ExportKeys)
    network = ["model=r2plus1d_small", "model.width=4"]
    assert same_weights(load_trained("hf://org/net", network, ExportKeys).model, expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://org/net/gone.pth", "the repository has no such file"),
        ("hf://org/net", "it has no model.safetensors, so add the name of a file"),
        ("hf://org/none", "no such repository, or it is private"),
        ("hf://net", "write it as hf://ORGANISATION/NAME"),
    ],
)
def test_wrong_paths_on_the_hub_are_one_line(path: str, message: str, server: Path) -> None:
    (server / "org/net").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        load_pretrained(r2plus1d_small(3, width=4), path)


def test_a_cached_file_is_read_without_a_network(
    run: Path, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    export.main([f"ckpt={run}", f"out={tmp_path / 'w.safetensors'}"])
    (server / "org/net").mkdir(parents=True)
    (tmp_path / "w.safetensors").rename(server / "org/net/w.safetensors")
    model = r2plus1d_small(3, width=4)
    load_pretrained(model, "hf://org/net/w.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1
    load_pretrained(model, "hf://org/net/w.safetensors")
    with pytest.raises(UserError, match="the Hub cannot be reached, and the file is not in its cache"):
        load_pretrained(model, "hf://org/net/other.safetensors")


def test_repo_uploads_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[tuple[Any, ...]] = []

    class FakeApi:
        def __init__(self, endpoint: str | None) -> None: ...

        def create_repo(self, repo: str, exist_ok: bool) -> str:
            calls.append(("create", repo, exist_ok))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
            if repo_id == "org/refused":
                raise OSError("403 Forbidden")
            files = [path.name for path in folder_path.iterdir() if path.name in allow_patterns]
            calls.append(("upload", repo_id, sorted(files)))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    arguments = [f"ckpt={run}", "format=hub", f"out={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/private.txt").write_text("not uploaded")
    export.main([*arguments, "repo=org/net"])
    files = ["README.md", "classes.txt", "config.yaml", "model.safetensors", "report.json"]
    assert calls == [("create", "org/net", True), ("upload", "org/net", files)]
    assert "uploaded to https://hub/org/net" in capsys.readouterr().out
    assert "mgvideo predict video.mp4 ckpt=hf://org/net" in (tmp_path / "out/README.md").read_text()
    line = error_line(export.main, [*arguments, "repo=org/refused"], capsys)
    assert "repo=org/refused: 403 Forbidden; the folder is complete" in line


def test_a_missing_package_and_wrong_keys_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "add format=hub" in error_line(export.main, ["ckpt=c", "out=x.onnx", "repo=org/net"], capsys)
    assert "format=hub writes a folder" in error_line(export.main, ["ckpt=c", "out=x"], capsys)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert "pip install 'mgvideo[hub]'" in error_line(export.main, ["ckpt=c", "out=x", "format=hub"], capsys)
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(paths._handlers, "hf://", raising=False)
    with pytest.raises(UserError, match=r"hf:// needs huggingface_hub \(pip install 'mgvideo\[hub\]'\)"):
        load_pretrained(r2plus1d_small(3, width=4), "hf://org/net")
