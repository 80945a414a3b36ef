"""Load a trained network and the config of its run from the path of a checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
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
from mgvideo.storage.checkpoints import read_checkpoint
from mgvideo.storage.paths import hub_repository, is_remote, local_copy, strip_file_scheme

from . import app
from . import keys as program_keys
from .build import best_checkpoint, published_clip_warning
from .groups import holds_text
from .help import GROUPS, group_options
from .schema import RunKeys, check_values
from .suggest import suggestion
from .values import override_key, read_dotlist

SKIPPED_KEYS = ("loader", "init_from_key")  # of a saved config: for the run's machine and its init_from
TORCHVISION_WEIGHTS = r"\w+_Weights\.\w+"  # names of weights that torchvision downloads
HELP = (
    "A checkpoint in a run's folder uses the config of its run. Other weights need model=…, and use the Kinetics",
    "recipe of that network unless you set experiment=… or dataset=…, or base.num_frames=…, base.frame_stride=…,",
    "test.crop_size=…, normalize.mean=…, normalize.std=…. All groups and keys: python tools/run_net.py --help",
)


@dataclass(frozen=True)
class Trained:
    """A network with its weights, on the CPU and in evaluation mode, and its run's config."""

    model: nn.Module
    cfg: DictConfig
    weights: str  # path or URL
    folder: Path | None  # the run's folder
    load_summary: str  # which tensors were loaded

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.cfg.model.num_classes)

    @property
    def name(self) -> str:
        """The option of `model` that the run chose, or the network's class if that is not known."""
        return self.cfg.model_option or type(self.model).__name__

    def __str__(self) -> str:
        return f"{self.name} with {self.classes} classes from {self.weights}"


def load_trained(ckpt: str | None, overrides: Sequence[str], keys_class: type, key: str = "ckpt") -> Trained:
    """Load a network with the number of classes of its weights.

    Args:
        ckpt: A checkpoint, a run's folder (its best checkpoint is used, or else its newest), or any weights that
            `init_from` accepts.
        overrides: `key=value` changes to the config.
        keys_class: The dataclass of the program's additional keys, for suggestions in error messages.
        key: The key that holds `ckpt`, for error messages.

    Raises:
        UserError: The file does not exist or does not fit the network, a key is unknown, or no network is given.
    """
    weights, config = locate(ckpt, key)
    file = Path(weights).resolve()
    if file.suffix == ".pt" and file.with_suffix(".sha256").exists():
        read_checkpoint(Path(weights))  # reports a damaged checkpoint as such
    cfg = run_config(config, overrides, keys_class) if config else config_for_weights(weights, overrides, key)
    check_values(cfg)
    if not config and (warning := published_clip_warning(cfg, {override_key(override) for override in overrides})):
        print(f"warning: {warning}", file=sys.stderr)
    cfg.model.num_classes = cfg.dataset.num_classes = _classes_in(weights, cfg)
    model: nn.Module = instantiate(cfg.model)
    load_summary = load_pretrained(model, weights, key=cfg.init_from_key)
    return Trained(model.eval(), cfg, weights, config.parent if config else None, load_summary)


def locate(ckpt: str | None, key: str = "ckpt") -> tuple[str, Path | None]:
    """Return the path or URL of the weights that `ckpt` refers to, and the config file of their run if it is local."""
    if ckpt is None:
        raise UserError(f"{key} is not set: add {key}=PATH to the command, a checkpoint or a run's folder")
    if hub_repository(ckpt):
        return _locate_on_hub(ckpt, key)
    if is_remote(ckpt):  # no search for a config beside it: not every server lists files
        return ckpt, None
    path = Path(strip_file_scheme(ckpt)).expanduser()
    if path.is_dir():
        path = best_checkpoint(path, key)
    elif not path.exists():
        if re.fullmatch(TORCHVISION_WEIGHTS, ckpt):
            return ckpt, None
        raise UserError(f"{key}={ckpt}: no such file or folder")
    files = [folder / "config.yaml" for folder in (path.parent.parent, path.parent)]
    return str(path), next(filter(_is_run_config, files), None)


def _locate_on_hub(ckpt: str, key: str) -> tuple[str, Path | None]:
    """Fetch weights from the Hugging Face Hub, and the config and class names of their repository if it has them."""
    try:
        weights = local_copy(ckpt)
        for name in ("config.yaml", "classes.txt"):
            with suppress(FileNotFoundError):
                local_copy(f"{hub_repository(ckpt)}/{name}")
    except OSError as error:
        raise UserError(f"cannot read {key}={ckpt}: {error.strerror or error}") from error
    config = Path(weights).with_name("config.yaml")
    return ckpt, config if _is_run_config(config) else None


def _is_run_config(file: Path) -> bool:
    """Return whether a file is the config that a run saved."""
    if not file.is_file():
        return False
    try:
        return {"model", "dataset", "base", "normalize", "test"} <= OmegaConf.load(file).keys()
    except Exception:  # any other file may have this name
        return False


def run_config(file: Path, overrides: Sequence[str], keys_class: type) -> DictConfig:
    """Return the config that a run saved, with overrides. The keys of `loader` get their defaults, for this machine.

    Raises:
        UserError: A key or value does not exist, or the file would call code that no config of mgvideo calls.
    """
    for override in overrides:
        name, is_key, _ = override.partition("=")
        if not is_key:
            raise UserError(f"cannot read '{override}': write it as key=value")
        if name in GROUPS:
            raise UserError(
                f"{override}: {file} already sets this group; set groups only for weights outside a run's folder"
            )
    saved: Any = OmegaConf.load(file)
    _check_trust(file, OmegaConf.to_container(saved), overrides)
    if isinstance(saved.dataset, DictConfig):
        _follow_root(saved.dataset, saved.dataset.get("root"))
    try:
        sections = {key: saved[key] for key in saved if key not in SKIPPED_KEYS}
        cfg: Any = OmegaConf.merge(OmegaConf.structured(RunKeys), sections)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error
    keys = list(app.flat_keys(cfg))
    for name in (override.split("=")[0] for override in overrides):
        if name not in keys:
            hint = suggestion(name, keys, program_keys.names(keys_class))
            raise UserError(f"{name} is not a key of this program or of {file}{hint}")
    try:
        return OmegaConf.merge(cfg, read_dotlist(overrides, partial(holds_text, cfg)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _follow_root(node: Any, root: str | None) -> None:
    """Let the keys `root` below a saved dataset refer to `dataset.root`, so that an override changes them too."""
    for name in list(node):
        if isinstance(node._get_node(name), DictConfig):
            if "root" in node[name] and node[name].get("root") == root:  # get: None for a value that is not set
                node[name].root = "${dataset.root}"
            _follow_root(node[name], root)


def _check_trust(file: Path, saved: Any, overrides: Sequence[str], prefix: str = "") -> None:
    """Raise UserError if a saved config has a `_target_` that no config of mgvideo names.

    A config that is shared with weights could otherwise run any code. An override that repeats the target allows it.
    """
    for name, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        key = f"{prefix}{name}"
        if isinstance(value, dict | list):
            _check_trust(file, value, overrides, f"{key}.")
        elif name == "_target_" and value not in known_targets() and f"{key}={value}" not in overrides:
            raise UserError(
                f"{file} would call {key}={value}, which no config of mgvideo calls; nothing was run. "
                f"If you trust it, add {key}={value} to the command"
            )
        elif isinstance(value, str) and "${" in value:  # an interpolation could change a target
            raise UserError(f"{file}: {key}={value} refers to another value, which no config saved by a run does")


@cache
def known_targets() -> set[str]:
    """Return all values of `_target_` in the configs of mgvideo."""
    texts = [file.read_text(encoding="utf-8") for file in Path(str(configs.__file__)).parent.rglob("*.yaml")]
    return {target for text in texts for target in re.findall(r"\b_target_: ([\w.]+)", text)}


def config_for_weights(weights: str, overrides: Sequence[str], key: str = "ckpt") -> DictConfig:
    """Compose a config for weights outside a run's folder, by default with the Kinetics recipe of the network.

    Raises:
        UserError: The overrides name no network, or do not compose.
    """
    values = dict(override.partition("=")[::2] for override in overrides)
    if not {"model", "experiment"} & values.keys():
        raise UserError(
            f"{key}={weights} is not in a run's folder: add its network to the command, model=… or experiment=…"
        )
    recipe = []
    if not {"dataset", "experiment"} & values.keys():
        experiment = f"kinetics/{values['model']}"
        exists = experiment in group_options()["experiment"]
        recipe = [f"experiment={experiment}" if exists else "dataset=kinetics400"]
    cfg = app.compose_config("run", [*recipe, *overrides])
    if "model_option" not in values:
        cfg.model_option = cfg.hydra.runtime.choices.model
    return cfg


def _classes_in(weights: str, cfg: DictConfig) -> int:
    """Return the number of classes of the classifier in a file of weights. Raises UserError if it has none."""
    cfg.model.num_classes = cfg.model.num_classes or 1
    with torch.device("meta"):
        model: nn.Module = instantiate(cfg.model)
    classes = find_copy(model, read_weights(weights), weights, key=cfg.init_from_key).num_classes
    if classes is None:
        raise UserError(f"{weights} has no classifier and cannot predict: train it first, with init_from={weights}")
    return classes
