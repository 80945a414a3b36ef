"""Copies of a network's weights in a checkpoint: under which names they lie, which fit, and which one to take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgvideo.errors import UserError

from .naming import SOURCES, source_names
from .weights_file import StandIn

# what DDP, torch.compile, FSDP and activation checkpointing put into names, at any place
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged?|averaging|teacher|shadow)(_|$)")
HEADS = re.compile(r"(^|_)(head|fc|cls|classifier|logits)(_|\d|$)")
ALIKE = 0.2  # of a network's names that a copy of it has at least
LISTED = 20  # so many tensors that do not fit are named, the rest are counted
GROUPS_LISTED = 4  # the same of what is left over


@dataclass
class WeightsCopy:
    """The tensors of a checkpoint that have a network's names under one prefix."""

    where: str
    prefix: str  # before the network's own names: containers and wrappers
    source: str
    found: dict[str, str]  # our names → names in the checkpoint
    place: int  # in the order of the checkpoint
    is_averaged: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)  # to load, by our names
    problems: list[str] = field(default_factory=list)  # why they are not of this network
    classes: int | None = None  # of the head, None where there is none
    head: str = ""  # what there is to say of the head
    starts_anew: bool = False  # the network's own head, as none in the checkpoint fits
    notes: list[str] = field(default_factory=list)  # on the rest of the checkpoint

    @property
    def key(self) -> str:
        """Its name in the checkpoint, without wrappers at its end."""
        return re.sub(rf"(^|\.)({'|'.join(WRAPPERS)})(?=\.|$)", "", self.prefix.rstrip(".")).lstrip(".")

    def __str__(self) -> str:
        under = f", under {self.prefix.rstrip('.')}" if self.prefix else ""
        text = f"{len(self.tensors)} tensors from {self.where}{under}, with names of {self.source}"
        return "; ".join([text, *([self.head] if self.head else []), *self.notes])


def find_copy(
    model: nn.Module, checkpoint: Any, where: str, source: str = "auto", key: str | None = None
) -> WeightsCopy:
    """The copy of a network's weights in a checkpoint that is to be loaded, by the rules of `load_pretrained`.

    Raises:
        UserError: there is none, or none that fits; the message lists why.
    """
    given = dict(named_tensors(checkpoint))
    if not given:
        raise UserError(f"{where} holds no weights: {describe_contents(checkpoint)}")
    sources = list(SOURCES) if source == "auto" else [source]
    copies = [copy for name in sources for copy in _copies(model, given, name, where)]
    largest = max((len(copy.found) for copy in copies), default=0)
    if largest < ALIKE * len(model.state_dict()):
        groups = ", ".join(_groups(given, ""))
        raise UserError(
            f"{where} is of another network, or of a source that is not known: it has '{next(iter(given))}', "
            f"this network has '{next(iter(model.state_dict()))}'. All that is in it: {groups}"
        )
    copies = [copy for copy in copies if len(copy.found) > largest / 2]
    for copy in copies:
        _fill(copy, model, given)
    fitting = list({copy.prefix: copy for copy in reversed(copies) if not copy.problems}.values())[::-1]
    if key is not None:
        named = [copy for copy in copies if _is_named(copy, key)]
        if not named:
            there = ", ".join(dict.fromkeys(copy.key or "its top" for copy in copies))
            raise UserError(f"init_from_key={key}: {where} has no copy of this network there, but in {there}")
        copies, fitting = named, [copy for copy in fitting if copy in named]
    if not fitting:
        raise UserError(_misfit(max(copies, key=lambda copy: (-len(copy.problems), len(copy.found)))))
    chosen = min(fitting, key=lambda copy: (copy.classes is None, not copy.is_averaged, copy.place))
    chosen.notes = _notes(chosen, fitting, copies, given, checkpoint)
    return chosen


def named_tensors(node: Any, prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, at any depth, with the names of the containers before their own."""
    if isinstance(node, Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, np.ndarray):
        if node.dtype.kind in "fiub":
            yield prefix[:-1], torch.as_tensor(node.astype(node.dtype.newbyteorder("=")))
    elif id(node) not in above:
        for name, inner in _items(node):
            yield from named_tensors(inner, f"{prefix}{name}.", (*above, id(node)))


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, StandIn):
        return node.contents().items()
    if isinstance(node, Mapping):
        return node.items()
    return enumerate(node) if isinstance(node, list | tuple) else ()


def describe_contents(checkpoint: Any) -> str:
    """What a checkpoint without tensors holds."""
    items = [f"{name} ({_kind(value)})" for name, value in _items(checkpoint)]
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"it is of type {_kind(checkpoint)}" + (f" and holds {', '.join(items[:LISTED])}{more}" if items else "")


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _copies(model: nn.Module, given: Mapping[str, Tensor], source: str, where: str) -> list[WeightsCopy]:
    """What could be copies of the network's weights with the names of a source: all prefixes before such names."""
    expected = source_names(model, source)
    parts_of_names = {part for name in expected for part in name.split(".")}
    wrappers = set(WRAPPERS) - parts_of_names
    found: dict[str, dict[str, str]] = {}
    for name in given:
        parts = name.split(".")
        for start, part in enumerate(parts):
            if part in wrappers:
                continue
            own = _own_name(".".join(p for p in parts[start:] if p not in wrappers), source)
            if own in expected:
                prefix = name[: sum(len(p) + 1 for p in parts[:start])]
                found.setdefault(prefix, {})[expected[own]] = name
    order = {name: place for place, name in enumerate(given)}
    return [
        WeightsCopy(where, prefix, source, mine, order[next(iter(mine.values()))], _is_averaged(prefix, given))
        for prefix, mine in found.items()
    ]


def _own_name(name: str, source: str) -> str:
    """A name as its source's rules make it: Caffe2's files name lateral connections by the block before them, too."""
    return re.sub(r"^(t_res\d)_\d+(_branch2c_bn_subsample)", r"\1\2", name) if source == "caffe2" else name


def _is_averaged(prefix: str, given: Mapping[str, Tensor]) -> bool:
    """Whether a copy is of averages over steps, by its name or by the counter of torch's AveragedModel."""
    beside = re.sub(rf"(({'|'.join(WRAPPERS)})\.)+$", "", prefix)
    return f"{beside}n_averaged" in given or any(AVERAGED.search(part.lower()) for part in prefix.split("."))


def _fill(copy: WeightsCopy, model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Fit a copy's tensors to the network, and note what does not."""
    state = model.state_dict()
    copy.tensors = {ours: fit_to_shape(given[name], state[ours].shape) for ours, name in copy.found.items()}
    head = {name for name in _fill_head(copy, model, given) if name in state}
    there = {ours: name for name, ours in source_names(model, copy.source).items()}
    copy.problems = [f"{name} is unexpected" for name in _unexpected(copy, given, there.values())]
    for ours, tensor in state.items():
        name, mine = f"{copy.prefix}{there[ours]}", copy.tensors.get(ours)
        if ours in head:
            copy.tensors.pop(ours, None)
        elif mine is None:
            if not may_be_missing(ours, copy.source):
                copy.problems.append(f"{name} is missing")
        elif mine.shape != tensor.shape:
            copy.problems.append(f"{name} is {list(mine.shape)} and not {list(tensor.shape)}")
        elif tensor.is_floating_point() and not mine.is_floating_point():
            copy.problems.append(f"{name} is {str(mine.dtype).removeprefix('torch.')}, as of a compressed network")
        elif not mine.isfinite().all():
            copy.problems.append(f"{name} holds values that are not finite")


def _fill_head(copy: WeightsCopy, model: nn.Module, given: Mapping[str, Tensor]) -> set[str]:
    """Find a copy's head, also beside its body; the names of our head's tensors where ours is to stay."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return set()
    name, head = linear[-1]
    ours = {f"{name}.weight", f"{name}.bias"}
    if not ours & copy.tensors.keys():
        other = _head_beside(copy, head, given)
        if other is None:
            copy.head, copy.starts_anew = f"there is no head in {copy.where}: ours starts anew", True
            return ours
        copy.tensors |= {f"{name}.{kind}": given[f"{other}.{kind}"] for kind in ("weight", "bias")}
        copy.tensors[f"{name}.weight"] = fit_to_shape(copy.tensors[f"{name}.weight"], head.weight.shape)
        copy.found |= {f"{name}.{kind}": f"{other}.{kind}" for kind in ("weight", "bias")}
        copy.head = f"its head is {other}"
    weight = copy.tensors.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != head.weight.shape[1]:
        return set()
    copy.classes = len(weight)
    if copy.classes == len(head.weight):
        return set()
    copy.head = f"the head in {copy.where} is for another number of classes: it is left out, ours starts anew"
    copy.starts_anew = True
    return ours


def _head_beside(copy: WeightsCopy, head: nn.Linear, given: Mapping[str, Tensor]) -> str | None:
    """The one linear layer outside of a copy whose name and whose shape are those of a head for its features."""
    container = copy.prefix[: copy.prefix.rstrip(".").rfind(".") + 1]
    found = []
    for name, weight in given.items():
        layer, _, kind = name.rpartition(".")
        inside = name.startswith(copy.prefix) if copy.prefix else name in copy.found.values()
        if kind != "weight" or inside or not name.startswith(container) or f"{layer}.bias" not in given:
            continue
        parts = layer[len(container) :].lower().split(".")
        is_head = any(map(HEADS.search, parts)) and not any(map(AVERAGED.search, parts))
        if is_head and weight.flatten(1).shape[1] == head.in_features and weight.ndim > 1:
            found.append(layer)
    return found[0] if len(found) == 1 else None


def _unexpected(copy: WeightsCopy, given: Mapping[str, Tensor], expected: Iterable[str]) -> list[str]:
    """Names in a copy that the network lacks: under its prefix, beginning like a part of the network."""

    def first(name: str) -> str:
        return re.sub(r"\d+", "", name.split(".")[0])

    mine, starts = set(copy.found.values()), {first(name) for name in expected}
    found = []
    for name in given:
        if not name.startswith(copy.prefix) or name in mine:
            continue
        own = ".".join(part for part in name[len(copy.prefix) :].split(".") if part not in WRAPPERS)
        if (first(own) in starts) if copy.source != "caffe2" else not _is_of_solver(own):
            found.append(name)
    return found


def _is_of_solver(name: str) -> bool:
    """Whether a tensor of a Caffe2 file is its solver's."""
    return name.endswith("_momentum") or name in ("lr", "model_iter")


def fit_to_shape(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in this shape where it is a kernel to inflate or differs by ones at the end, else as it is."""
    if tensor.ndim == 4 and len(shape) == 5:
        return tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    short, long = sorted((tuple(tensor.shape), tuple(shape)), key=len)
    if long[len(short) :] == (1,) * (len(long) - len(short)) and long[: len(short)] == short:
        return tensor.reshape(shape)
    return tensor


def may_be_missing(name: str, source: str) -> bool:
    """Counters that nothing reads, and the non-local blocks that an image network lacks, which begin as identities."""
    return name.endswith("num_batches_tracked") or (source == "torchvision" and ".nonlocal" in name)


def _is_named(copy: WeightsCopy, key: str) -> bool:
    parts, wanted = copy.prefix.split("."), key.strip(".").split(".")
    return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts)))


def _misfit(copy: WeightsCopy) -> str:
    more = f" and {len(copy.problems) - LISTED} more" if len(copy.problems) > LISTED else ""
    listed = "; ".join(copy.problems[:LISTED])
    return f"{copy.where} does not fit this network, as {copy.source}: {listed}{more}"


def _notes(
    chosen: WeightsCopy,
    fitting: list[WeightsCopy],
    copies: list[WeightsCopy],
    given: Mapping[str, Tensor],
    checkpoint: Any,
) -> list[str]:
    """What to say of the rest of a checkpoint: other copies, tensors that are not used, objects that are not read."""
    notes = []
    others = [copy.key or "the top" for copy in fitting if copy is not chosen]
    if others:
        notes.append(f"other copies of this network in it: {', '.join(others)} (init_from_key=NAME takes one)")
    taken = {copy.prefix for copy in fitting}
    for copy in {copy.prefix: copy for copy in copies if copy.prefix not in taken}.values():
        notes.append(f"{copy.key or 'the top'} is passed over: {copy.problems[0]}")
    used = {name for copy in (chosen, *copies) for name in copy.found.values()}
    left = [name for name in given if name not in used and not _is_of_solver(name.rpartition(".")[2])]
    if left:
        notes.append(f"not used: {', '.join(_groups(left, chosen.prefix))}")
    unread = sorted({_kind(value) for value in _objects(checkpoint)})
    if unread:
        notes.append(f"not read: objects of {', '.join(unread[:LISTED])}")
    return notes


def _groups(left: Iterable[str], prefix: str) -> list[str]:
    """Names of tensors, brought together by the containers that a prefix does not lead into, with their number."""
    sizes: Counter[str] = Counter()
    for name in left:
        parts, path = name.split("."), prefix.split(".")
        depth = next((i for i, (a, b) in enumerate(zip(parts, path, strict=False)) if a != b), len(path))
        sizes[".".join(parts[: depth + 1])] += 1
    listed = [f"{name} ({size})" if size > 1 else name for name, size in sizes.most_common(GROUPS_LISTED)]
    return [*listed, f"and {len(sizes) - GROUPS_LISTED} more"] if len(sizes) > GROUPS_LISTED else listed


def _objects(node: Any, above: tuple[int, ...] = ()) -> Iterator[StandIn]:
    if isinstance(node, StandIn):
        yield node
    elif not isinstance(node, Tensor | np.ndarray | str) and id(node) not in above:
        for _, inner in _items(node):
            yield from _objects(inner, (*above, id(node)))
