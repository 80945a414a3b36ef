"""Check the keys of the config groups against the types that the targets of their YAML declare."""

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
from mgvideo.plan.options import ScheduleOptions

from .schema import check_value, key

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass
class DatasetKeys:
    """The keys that all datasets have in common."""

    task: str = key(MISSING, "kind of labels", choices=tuple(TASKS))
    root: str = key(MISSING, "the dataset's folder")
    train_videos: int | None = key(
        None, "number of training videos, for a plan without the data; null: unknown", least=1
    )
    num_classes: int | None = key(None, "number of classes; null: count them in the data", least=1)
    pyramid: str | None = key(None, "folder of the dataset's pyramid; null: read the original videos")
    index: str | None = key(
        "auto", "packet index of the videos; auto: .mgvideo/packets.index in root and in pyramid; null: no index"
    )
    frame_cache: str | None = key(None, "folder that caches decoded frames; null: no cache")
    frame_cache_gib: float = key(4.0, "size limit of the frame cache, in GiB", least=0)
    frames_fps: float = key(30.0, "frames per second of videos that are folders of images", above=0)
    cache_gib: float | None = key(
        None, "size limit of the local copies of remote videos, in GiB; null: all but 5 % of the disk", above=0
    )
    max_bad_fraction: float = key(
        0.05, "largest fraction of clips that may fail to decode before the run stops", least=0
    )


def check_groups(cfg: DictConfig) -> None:
    """Check the types of the groups' keys, before anything is built.

    Raises:
        UserError: Names the first key with a value of the wrong type, and the right type.
    """
    _check_types("dataset", cfg.dataset, get_type_hints(DatasetKeys))
    _check_types("schedule", cfg.schedule, get_type_hints(ScheduleOptions))
    for entry in fields(DatasetKeys):
        if entry.name in cfg.dataset and not OmegaConf.is_missing(cfg.dataset, entry.name):
            check_value(f"dataset.{entry.name}", cfg.dataset[entry.name], entry.metadata["limits"])
    for group in ("model", "dataset", "schedule", "optimizer", "decoder"):
        for name, node in _targets(group, cfg[group]):
            _check_types(name, node)


def _targets(name: str, node: Any) -> Iterator[tuple[str, DictConfig]]:
    """Yield the node and those below it that have a `_target_`, with their dotted names."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield name, node
    for inner in map(str, node):
        if not OmegaConf.is_missing(node, inner):
            yield from _targets(f"{name}.{inner}", node._get_node(inner))


def holds_text(cfg: DictConfig, key: str) -> bool | None:
    """Return whether a key holds a string, by its declared type or current value; None if the key does not exist."""
    parent_key, _, name = key.rpartition(".")
    parent: Any = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    node = parent._get_node(name, validate_access=False) if isinstance(parent, DictConfig) else None
    if isinstance(node, StringNode):
        return True
    if not isinstance(node, AnyNode):
        return None if node is None else False
    if not (node._is_none() or node._is_missing() or node._is_interpolation()):
        return isinstance(node._value(), str)
    declared = {"dataset": DatasetKeys, "schedule": ScheduleOptions}.get(parent_key)
    hints = {**_hints(parent), **(get_type_hints(declared) if declared else {})}
    return _kinds(hints.get(name)) == {str}


def _hints(node: DictConfig) -> dict[str, Any]:
    """Return the types that a node's target declares for its arguments; empty if they cannot be read."""
    try:
        target = get_object(node._target_)
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # building the object reports the error
        return {}


def _check_types(name: str, node: DictConfig, hints: dict[str, Any] | None = None) -> None:
    """Raise UserError if a plain value of a node does not match its type in `hints`, by default that of its target."""
    hints = _hints(node) if hints is None else hints
    for inner in map(str, node):
        kinds = _kinds(hints.get(inner))
        try:
            value = node[inner]
        except (MissingMandatoryValue, InterpolationToMissingValueError):  # reported when the value is read
            continue
        if kinds and value is not None and not _fits(value, kinds):
            raise UserError(
                f"{name}.{inner}={value}: give {TYPE_NAMES[next(kind for kind in TYPE_NAMES if kind in kinds)]}"
            )


def _kinds(hint: Any) -> set[type]:
    """Return the plain types that a hint allows besides None; empty if it also allows other types."""
    options = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    options.discard(types.NoneType)
    return options if options <= TYPE_NAMES.keys() else set()


def _fits(value: Any, kinds: set[type]) -> bool:
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    return type(value) in kinds or (type(value) is int and float in kinds)
