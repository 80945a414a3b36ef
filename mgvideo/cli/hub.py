"""A folder for the Hugging Face Hub: weights as safetensors, config, class names and a model card; and its upload."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import nn

from mgvideo.errors import UserError
from mgvideo.plan.plan import require
from mgvideo.storage.checkpoints import checkpoint_step
from mgvideo.storage.files import replace_when_complete, write_atomic
from mgvideo.storage.paths import HUB_WEIGHTS, is_remote

from .schema import RunKeys
from .trained import Trained

FILES = (HUB_WEIGHTS, "config.yaml", "classes.txt", "report.json", "README.md")  # of a folder for the Hub
MACHINE_KEYS = ("output_dir", "resume", "init_from")  # of a config: places on the machine of the run
PATH_KEYS = ("root", "pyramid", "frame_cache")  # of datasets


def write_weights(model: nn.Module, file: Path) -> None:
    """Write a network's tensors to a safetensors file, read it again, and compare. Raises UserError if they differ."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with open(file, "wb") as target:
        target.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    written = safetensors.torch.load_file(file)
    same = written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)
    require(same, f"{file.name} differs from the network when it is read again: nothing was written")


def require_hub() -> None:
    """Raise UserError if huggingface_hub is not installed."""
    if find_spec("huggingface_hub") is None:
        raise UserError("format=hub requires huggingface_hub: pip install 'mgvideo[hub]'")


def write_hub_folder(trained: Trained, folder: Path, repo: str | None = None) -> None:
    """Write everything that `ckpt=hf://…` reads, and README.md with the results of the run's test.

    Args:
        trained: the network.
        folder: where to write; it is created.
        repo: `organisation/name`, for the commands in README.md.

    Raises:
        UserError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replace_when_complete(folder / HUB_WEIGHTS) as part:
        write_weights(trained.model, part)
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(public_config(trained))).encode())
    names = trained.folder / "classes.txt" if trained.folder else None
    if names and names.exists():
        write_atomic(folder / "classes.txt", names.read_bytes())
    report = read_report(trained)
    if report:
        write_atomic(folder / "report.json", json.dumps(report, indent=1).encode())
    write_atomic(folder / "README.md", model_card(trained, report, repo).encode(errors="replace"))


def public_config(trained: Trained) -> dict[str, Any]:
    """Return the config without paths of the machine on which the network was trained."""
    kept = [field.name for field in fields(RunKeys) if field.name not in MACHINE_KEYS and field.name in trained.cfg]
    cfg = OmegaConf.masked_copy(trained.cfg, kept)
    if OmegaConf.is_missing(cfg.dataset, "root"):
        cfg.dataset.root = None  # other keys refer to it
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return _without_paths(config)


def _without_paths(node: Any, name: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _without_paths(value, str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value) for value in node]
    is_path = isinstance(node, str) and (name in PATH_KEYS or os.path.isabs(node) or is_remote(node))
    return None if is_path else node


def read_report(trained: Trained) -> dict[str, Any]:
    """Return the report of the run's test, with `step`, the step that was tested; empty if there is none."""
    if trained.folder is None or not (trained.folder / "report.json").exists():
        return {}
    report = json.loads((trained.folder / "report.json").read_text(encoding="utf-8"))
    test = trained.folder / "test.json"
    step = json.loads(test.read_text(encoding="utf-8")).get("step") if test.exists() else report.get("step")
    report.pop("weights", None)  # may be a path on this machine
    return {**report, "step": step}


def model_card(trained: Trained, report: Mapping[str, Any], repo: str | None) -> str:
    """Return README.md: metadata for the Hub, what the network is, its results, and how to use it."""
    from huggingface_hub import ModelCardData

    cfg = trained.cfg
    base, test = cfg.base, cfg.test
    step = checkpoint_step(Path(trained.weights).resolve().name)
    metadata = ModelCardData(
        library_name="mgvideo", pipeline_tag="video-classification", tags=["mgvideo", "video"]
    ).to_yaml()
    name = report.get("name") or f"{type(trained.model).__name__} on {cfg.dataset.name}"
    place = f"hf://{repo}" if repo else "FOLDER"
    scores = "softmax" if cfg.dataset.task == "single_label" else "sigmoid"
    lines = [
        *("---", metadata.strip(), "---", "", f"# {name}", ""),
        f"A video-classification network with {trained.classes} classes, for mgvideo.",
        "",
        "| | |",
        "| --- | --- |",
        f"| network | {type(trained.model).__name__} |",
        f"| input | {base.num_frames} frames at stride {base.frame_stride}, {test.crop_size} pixels, RGB in 0–1, minus "
        f"{list(cfg.normalize.mean)}, divided by {list(cfg.normalize.std)} |",
        f"| output | logits of {trained.classes} classes, before the {scores} |",
        f"| weights | `{HUB_WEIGHTS}`" + (f", of step {step} |" if step is not None else " |"),
        "",
        "## Results",
        "",
        *_results(report, step),
        "",
        "## Use",
        "",
        "```",
        f"mgvideo predict video.mp4 ckpt={place}",
        f"mgvideo run dataset=folder dataset.root=VIDEOS model=MODEL init_from={place}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _results(report: Mapping[str, Any], step: int | None) -> list[str]:
    """Return the lines on the run's test."""
    if not report:
        return ["Not measured."]
    metrics = ", ".join(f"{name} {value:.2f} %" for name, value in report["metrics"].items())
    lines = [
        f"{metrics} on {report['videos']} held-out videos, {report['views']} views (clips × crops) each; chance is "
        f"{report['chance']:.1f} %.",
    ]
    if step is not None and report["step"] not in (None, step):
        lines += ["", f"**These are the results of step {report['step']}; the weights here are those of step {step}.**"]
    if report.get("schedule"):
        lines += [
            "",
            f"Training: schedule {report['schedule']}, {report['epochs']:g} epochs in {report['steps']} steps, "
            f"{report['train_seconds']:.0f} s on {report['hardware']}, {report['precision']}.",
        ]
    return lines


def push_folder(folder: Path, repo: str) -> str:
    """Upload the `FILES` of a folder to a model repository, which is created if needed; return its address.

    Raises:
        UserError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES))  # not other files in it
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"repo={repo}: {reason}; the folder is complete in {folder} (hf auth login sets your token)"
        ) from error
    return str(address)
