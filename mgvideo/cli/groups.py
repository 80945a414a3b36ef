"""The keys of model, dataset, optimizer and decoder: held against what their YAML files' targets declare."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import MISSING, AnyNode, DictConfig, OmegaConf, StringNode
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from mgvideo.engine.tasks import TASKS
from mgvideo.errors import UserError

from .schema import check_value, key

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass
class DatasetKeys:
    """What every dataset's YAML file holds besides its own keys."""

    task: str = key(MISSING, "what a label is", choices=tuple(TASKS))
    root: str = key(MISSING, "the dataset's folder")
    train_videos: int | None = key(None, "training videos to plan for where root is not set; null: not known", least=1)
    num_classes: int | None = key(None, "null: as many as are found", least=1)
    pyramid: str | None = key(None, "folder of its pyramid")
    frame_cache: str | None = key(None, "folder for decoded frames")
    frame_cache_gib: float = key(4.0, "room for them", least=0)
    max_bad_fraction: float = key(0.05, "of the clips read, over which the run stops", least=0)


def check_groups(cfg: DictConfig) -> None:
    """Hold the groups' keys against their types, before anything is built; a schedule does so itself.

    Raises:
        UserError: the first that cannot be, and what it may be.
    """
    _check_types("dataset", cfg.dataset, get_type_hints(DatasetKeys))
    for entry in fields(DatasetKeys):
        if entry.name in cfg.dataset and not OmegaConf.is_missing(cfg.dataset, entry.name):
            check_value(f"dataset.{entry.name}", cfg.dataset[entry.name], entry.metadata["limits"])
    for group in ("model", "dataset", "optimizer", "decoder"):
        for name, node in _targets(group, cfg[group]):
            _check_types(name, node)


def _targets(name: str, node: Any) -> Iterator[tuple[str, DictConfig]]:
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield name, node
    for inner in map(str, node):
        if not OmegaConf.is_missing(node, inner):
            yield from _targets(f"{name}.{inner}", node._get_node(inner))


def holds_text(cfg: DictConfig, key: str) -> bool | None:
    """Return whether a key holds a text, by its declared type or its present value; None for an unknown key."""
    above, _, name = key.rpartition(".")
    parent: Any = OmegaConf.select(cfg, above) if above else cfg
    node = parent._get_node(name, validate_access=False) if isinstance(parent, DictConfig) else None
    if isinstance(node, StringNode):
        return True
    if not isinstance(node, AnyNode):
        return None if node is None else False
    if not (node._is_none() or node._is_missing() or node._is_interpolation()):
        return isinstance(node._value(), str)
    hints = get_type_hints(DatasetKeys) if above == "dataset" else _hints(parent)
    return str in _kinds(hints.get(name))


def _hints(node: DictConfig) -> dict[str, Any]:
    """The types that a node's target declares for its arguments; none where that cannot be told."""
    try:
        target = get_object(node._target_)
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # the build tells what is wrong with it
        return {}


def _check_types(name: str, node: DictConfig, hints: dict[str, Any] | None = None) -> None:
    """Check the plain values of a node against types: by default those that its target declares."""
    hints = _hints(node) if hints is None else hints
    for inner in map(str, node):
        kinds = _kinds(hints.get(inner))
        try:
            value = node[inner]
        except (MissingMandatoryValue, InterpolationToMissingValueError):  # told when it is needed
            continue
        if kinds and value is not None and not _fits(value, kinds):
            raise UserError(f"{name}.{inner}={value}: give {WORDS[next(kind for kind in WORDS if kind in kinds)]}")


def _kinds(hint: Any) -> set[type]:
    """The plain types that a hint allows besides None; none where it allows others too."""
    options = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    options.discard(types.NoneType)
    return options if options <= WORDS.keys() else set()


def _fits(value: Any, kinds: set[type]) -> bool:
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    return type(value) in kinds or (type(value) is int and float in kinds)
