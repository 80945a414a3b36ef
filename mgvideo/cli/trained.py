"""From the path of a checkpoint to its network and the recipe that it was trained with."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from mgvideo import configs
from mgvideo.errors import UserError
from mgvideo.models.pretrained import load_pretrained
from mgvideo.models.state_dicts import find_copy
from mgvideo.models.weights_file import read_weights
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint
from mgvideo.storage.paths import is_remote, plain

from . import app
from . import keys as own_keys
from .groups import holds_text
from .help import GROUPS, group_options
from .schema import RunKeys, check_values
from .suggest import suggestion
from .values import read_dotlist

OF_THE_RUN = ("loader", "init_from_key")  # what its config says of another machine and of other weights
DOWNLOADED = r"\w+_Weights\.\w+"  # torchvision's names of weights
HELP = (
    "A checkpoint in its run's folder brings its recipe along. Weights from elsewhere need their network, model=…, and",
    "have the Kinetics recipe of that network unless experiment=… or dataset=…, or base.num_frames=…, base.frame_stride=…,",
    "test.crop_size=…, normalize.mean=…, normalize.std=… say otherwise. All groups and keys: python tools/run_net.py --help",
)


@dataclass(frozen=True)
class Trained:
    """A network with its weights, on the CPU and in evaluation mode, and its run's config."""

    model: nn.Module
    cfg: DictConfig
    weights: str
    folder: Path | None  # of its run
    taken: str  # what was read from the weights

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return int(self.cfg.model.num_classes)

    def __str__(self) -> str:
        return f"{type(self.model).__name__} of {self.classes} classes from {self.weights}"


def load_trained(ckpt: str | None, overrides: Sequence[str], own: type) -> Trained:
    """The network of a checkpoint, of the best (else the newest) checkpoint of a run's folder, or of any weights that
    init_from takes; its number of classes is that of the weights. `own` are the keys that the program takes besides.

    Raises:
        UserError: no such file, one that does not fit its network, a key that is not known, or no network named.
    """
    weights, config = locate(ckpt)
    file = Path(weights).resolve()
    if file.suffix == ".pt" and file.with_suffix(".sha256").exists():
        read_checkpoint(Path(weights))  # which tells a damaged one from one that is not ours
    cfg = run_config(config, overrides, own) if config else foreign_config(weights, overrides)
    check_values(cfg)
    cfg.model.num_classes = cfg.dataset.num_classes = _classes_in(weights, cfg)
    model: nn.Module = instantiate(cfg.model)
    taken = load_pretrained(model, weights, key=cfg.init_from_key)
    return Trained(model.eval(), cfg, weights, config.parent if config else None, taken)


def locate(ckpt: str | None) -> tuple[str, Path | None]:
    """The file or URL of weights that `ckpt` stands for, and the config of the run that it lies in on this machine."""
    if ckpt is None:
        raise UserError("ckpt is not set: add ckpt=CHECKPOINT, or a run's folder, to the command")
    if is_remote(ckpt):  # what lies beside it is not looked for: not every server lists what it has
        return ckpt, None
    path = Path(plain(ckpt)).expanduser()
    if path.is_dir():
        path = _checkpoint_in(path)
    elif not path.exists():
        if re.fullmatch(DOWNLOADED, ckpt):
            return ckpt, None
        raise UserError(f"ckpt={ckpt}: there is no such file or folder")
    files = [folder / "config.yaml" for folder in (path.parent.parent, path.parent)]
    return str(path), next(filter(_is_of_a_run, files), None)


def _checkpoint_in(folder: Path) -> Path:
    """A run's best checkpoint, or else its newest."""
    inside = folder / "checkpoints"
    checkpoints = Checkpoints(inside if inside.is_dir() else folder)
    found, warnings = (checkpoints.best, []) if checkpoints.best.exists() else checkpoints.newest()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found is None:
        raise UserError(f"ckpt={folder}: no checkpoints in this folder; give a run's folder or a file")
    return found


def _is_of_a_run(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        return {"model", "dataset", "base", "normalize", "test"} <= OmegaConf.load(file).keys()
    except Exception:  # whatever a YAML file of somebody else's holds
        return False


def run_config(file: Path, overrides: Sequence[str], own: type) -> DictConfig:
    """A run's own config, changed by `key=value`; how clips are loaded is this machine's matter and starts anew.

    Raises:
        UserError: a key or a value that does not exist.
    """
    for override in overrides:
        name, is_key, _ = override.partition("=")
        if not is_key:
            raise UserError(f"cannot read '{override}': write it as key=value")
        if name in GROUPS:
            raise UserError(f"{override}: {file} says that already; groups are for weights that lie in no run's folder")
    saved: Any = OmegaConf.load(file)
    _check_trust(file, OmegaConf.to_container(saved), overrides)
    try:
        kept = {key: saved[key] for key in saved if key not in OF_THE_RUN}
        cfg: Any = OmegaConf.merge(OmegaConf.structured(RunKeys), kept)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error
    keys = list(app.flat_keys(cfg))
    for name in (override.split("=")[0] for override in overrides):
        if name not in keys:
            raise UserError(f"{name} is no key here, nor of {file}{suggestion(name, keys, own_keys.names(own))}")
    try:
        return OmegaConf.merge(cfg, read_dotlist(overrides, partial(holds_text, cfg)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _check_trust(file: Path, saved: Any, overrides: Sequence[str], prefix: str = "") -> None:
    """Raise UserError where a config that came with weights would have us call what no config of ours names."""
    for name, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        key = f"{prefix}{name}"
        if isinstance(value, dict | list):
            _check_trust(file, value, overrides, f"{key}.")
        elif name == "_target_" and value not in own_targets() and f"{key}={value}" not in overrides:
            raise UserError(
                f"{file} wants {key}={value} called, which no config of mgvideo's does: nothing was. "
                "Add that to the command if you trust it"
            )
        elif isinstance(value, str) and "${" in value:  # which could make a target of something else
            raise UserError(f"{file}: {key}={value} refers to another value, as no run leaves it")


@cache
def own_targets() -> set[str]:
    """All that the configs of mgvideo name to be called."""
    texts = [file.read_text(encoding="utf-8") for file in Path(str(configs.__file__)).parent.rglob("*.yaml")]
    return {target for text in texts for target in re.findall(r"\b_target_: ([\w.]+)", text)}


def foreign_config(weights: str, overrides: Sequence[str]) -> DictConfig:
    """The config that overrides compose, by default on the Kinetics recipe of the network that they name."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if not {"model", "experiment"} & given.keys():
        raise UserError(f"ckpt={weights} lies in no run's folder: say which network it is with model=… or experiment=…")
    recipe = []
    if not {"dataset", "experiment"} & given.keys():
        experiment = f"kinetics/{given['model']}"
        known = experiment in group_options()["experiment"]
        recipe = [f"experiment={experiment}" if known else "dataset=kinetics400"]
    return app.compose_config("run", [*recipe, *overrides])


def _classes_in(weights: str, cfg: DictConfig) -> int:
    """How many classes the classifier in a file of weights tells apart."""
    cfg.model.num_classes = cfg.model.num_classes or 1
    with torch.device("meta"):
        model: nn.Module = instantiate(cfg.model)
    classes = find_copy(model, read_weights(weights), weights, key=cfg.init_from_key).num_classes
    if classes is None:
        raise UserError(f"{weights} has no classifier: weights to start from, with nothing to predict yet")
    return classes
