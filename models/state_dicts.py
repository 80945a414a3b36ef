"""Find a network's weights in a checkpoint: under which names they lie, whether they fit, and which copy to load."""

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
from mgvideo.plan.formatting import shorten

from .mvit import resample
from .naming import SOURCES, source_names
from .weights_file import Placeholder

# name parts that DDP, torch.compile, FSDP and activation checkpointing insert, at any position of a name
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged?|averaging|teacher|shadow)(_|$)")
HEADS = re.compile(r"(^|_)(head|fc|cls|classifier|logits)(_|\d|$)")
POSITION_TABLES = re.compile(r"\.(rel_pos_[thw]|temporal_pos)$")  # MViT's, each along one axis
X3D_EPS = 1e-5  # of batch norm
MIN_SHARED_NAMES = 0.2  # a copy of a network has at least this fraction of the network's names
MAX_LISTED_TENSORS = 20  # a message lists this many tensors that do not fit and counts the rest
MAX_LISTED_GROUPS = 4  # a message lists this many groups of unused tensors and counts the rest


@dataclass
class WeightsCopy:
    """The tensors of a checkpoint whose names are a network's names after one common prefix."""

    origin: str  # the file or URL, for messages
    prefix: str  # containers and wrappers before the network's names, with the dot at the end
    source: str  # a key of `SOURCES`
    names: dict[str, str]  # our names → names in the checkpoint
    position: int  # of its first tensor in the checkpoint
    is_averaged: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the tensors to load, by our names
    problems: list[str] = field(default_factory=list)  # reasons why the tensors do not fit the network
    num_classes: int | None = None  # of the head; None: the copy has no head
    head_note: str = ""  # a remark about the head, for people
    keeps_own_head: bool = False  # the network keeps its initial head, because the checkpoint has no head that fits
    notes: list[str] = field(default_factory=list)  # remarks about the rest of the checkpoint, for people

    @property
    def key(self) -> str:
        """The copy's name in the checkpoint: its prefix without wrappers."""
        return re.sub(rf"(^|\.)({'|'.join(WRAPPERS)})(?=\.|$)", "", self.prefix.rstrip(".")).lstrip(".")

    def __str__(self) -> str:
        under = f", under {self.prefix.rstrip('.')}" if self.prefix else ""
        text = f"{len(self.tensors)} tensors from {self.origin}{under}, with names of {self.source}"
        return "; ".join([text, *([self.head_note] if self.head_note else []), *self.notes])


def find_copy(
    model: nn.Module, checkpoint: Any, origin: str, source: str = "auto", key: str | None = None
) -> WeightsCopy:
    """Choose the copy of a network's weights to load from a checkpoint, by the rules of `load_pretrained`.

    Raises:
        UserError: the checkpoint has no copy of this network, or none that fits. The message lists the reasons.
    """
    checkpoint_tensors = fuse_attention(dict(named_tensors(checkpoint)))
    if not checkpoint_tensors:
        raise UserError(f"{origin} contains no weights: {describe_contents(checkpoint)}")
    sources = list(SOURCES) if source == "auto" else [source]
    copies = [copy for name in sources for copy in _find_candidates(model, checkpoint_tensors, name, origin)]
    largest = max((len(copy.names) for copy in copies), default=0)
    if largest < MIN_SHARED_NAMES * len(model.state_dict()):
        groups = ", ".join(_group_names(checkpoint_tensors, ""))
        raise UserError(
            f"{origin} belongs to another network, or its source is unknown: its first tensor is "
            f"'{next(iter(checkpoint_tensors))}', this network's is '{next(iter(model.state_dict()))}'. "
            f"It contains {groups}"
        )
    copies = [copy for copy in copies if len(copy.names) > largest / 2]
    for copy in copies:
        _fill(copy, model, checkpoint_tensors)
    fitting = list({copy.prefix: copy for copy in reversed(copies) if not copy.problems}.values())[::-1]
    if key is not None:
        named = [copy for copy in copies if _is_named(copy, key)]
        if not named:
            keys = ", ".join(dict.fromkeys(copy.key or "the top level" for copy in copies))
            raise UserError(f"init_from_key={key}: {origin} has no copy of this network there, but in {keys}")
        copies, fitting = named, [copy for copy in fitting if copy in named]
    if not fitting:
        raise UserError(_describe_problems(max(copies, key=lambda copy: (-len(copy.problems), len(copy.names)))))
    chosen = min(fitting, key=lambda copy: (copy.num_classes is None, not copy.is_averaged, copy.position))
    chosen.notes += _describe_rest(chosen, fitting, copies, checkpoint_tensors, checkpoint)
    return chosen


def named_tensors(node: Any, prefix: str = "", ancestors: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor and numeric array of a checkpoint as a tensor, at any depth, with its dotted name.

    The name starts with the names of the containers around the tensor. `ancestors` are the ids of these containers,
    so that a container inside itself is not searched again.
    """
    if isinstance(node, Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, np.ndarray):
        if node.dtype.kind in "fiub":
            yield prefix[:-1], torch.as_tensor(node.astype(node.dtype.newbyteorder("=")))
    elif id(node) not in ancestors:
        for name, child in _items(node):
            yield from named_tensors(child, f"{prefix}{name}.", (*ancestors, id(node)))


def fuse_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the attention weights that transformers saves apart, as VideoMAE's authors save them.

    `query.weight`, `key.weight` and `value.weight` become `qkv.weight`, and `query.bias` and `value.bias`, which older
    versions of transformers call so already, `q_bias` and `v_bias`. Other tensors keep their names.
    """
    fused = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".attention.attention.")
        parts = [f"{layer}.attention.attention.{part}.weight" for part in ("query", "key", "value")]
        if not layer or not all(part in tensors for part in parts):
            fused[name] = tensor
        elif kind == "query.weight":
            fused[f"{layer}.attention.attention.qkv.weight"] = torch.cat([tensors[part] for part in parts])
        elif kind not in ("key.weight", "value.weight"):
            fused[re.sub(r"(query|value)\.bias$", lambda match: f"{match[1][0]}_bias", name)] = tensor
    return fused


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, Placeholder):
        return node.as_dict().items()
    if isinstance(node, Mapping):
        return node.items()
    return enumerate(node) if isinstance(node, list | tuple) else ()


def describe_contents(checkpoint: Any) -> str:
    """Describe a checkpoint without tensors: its type, and the names and types of its items."""
    items = [f"{name} ({_type_name(value)})" for name, value in _items(checkpoint)]
    text = f"it is of type {_type_name(checkpoint)}"
    return text + (f" and contains {shorten(items, MAX_LISTED_TENSORS)}" if items else "")


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _find_candidates(
    model: nn.Module, checkpoint_tensors: Mapping[str, Tensor], source: str, origin: str
) -> list[WeightsCopy]:
    """Find all possible copies of the network under a source's names: one for each prefix before such a name."""
    expected = source_names(model, source)
    parts_of_names = {part for name in expected for part in name.split(".")}
    wrappers = set(WRAPPERS) - parts_of_names
    names_by_prefix: dict[str, dict[str, str]] = {}
    for name in checkpoint_tensors:
        parts = name.split(".")
        for start, part in enumerate(parts):
            if part in wrappers:
                continue
            unwrapped = _normalize_name(".".join(p for p in parts[start:] if p not in wrappers), source)
            if unwrapped in expected:
                prefix = name[: sum(len(p) + 1 for p in parts[:start])]
                names_by_prefix.setdefault(prefix, {})[expected[unwrapped]] = name
    positions = {name: position for position, name in enumerate(checkpoint_tensors)}
    return [
        WeightsCopy(
            origin,
            prefix,
            source,
            names,
            positions[next(iter(names.values()))],
            _is_averaged(prefix, checkpoint_tensors),
        )
        for prefix, names in names_by_prefix.items()
    ]


def _normalize_name(name: str, source: str) -> str:
    """Remove the block number from Caffe2's names of lateral connections, which `SOURCES` has without it."""
    return re.sub(r"^(t_res\d)_\d+(_branch2c_bn_subsample)", r"\1\2", name) if source == "caffe2" else name


def _is_averaged(prefix: str, checkpoint_tensors: Mapping[str, Tensor]) -> bool:
    """Whether a copy is an average over steps, by its name or by the step counter of torch's AveragedModel."""
    unwrapped = re.sub(rf"(({'|'.join(WRAPPERS)})\.)+$", "", prefix)
    has_counter = f"{unwrapped}n_averaged" in checkpoint_tensors
    return has_counter or any(AVERAGED.search(part.lower()) for part in prefix.split("."))


def _fill(copy: WeightsCopy, model: nn.Module, checkpoint_tensors: Mapping[str, Tensor]) -> None:
    """Set a copy's `tensors`, reshaped to the network's shapes, and its `problems`."""
    state = model.state_dict()
    copy.tensors = {
        ours: fit_to_shape(checkpoint_tensors[name], state[ours].shape, POSITION_TABLES.search(ours) is not None)
        for ours, name in copy.names.items()
    }
    own_head = {name for name in _fill_head(copy, model, checkpoint_tensors) if name in state}
    names_in_source = {ours: name for name, ours in source_names(model, copy.source).items()}
    unexpected = _unexpected_names(copy, checkpoint_tensors, names_in_source.values())
    copy.problems = [f"{name} is unexpected" for name in unexpected]
    copy.notes += _fill_shortcut_norm(copy, state)
    for ours, parameter in state.items():
        name, tensor = f"{copy.prefix}{names_in_source[ours]}", copy.tensors.get(ours)
        if ours in own_head:
            copy.tensors.pop(ours, None)
        elif tensor is None:
            if not may_be_missing(ours, copy.source, copy.keeps_own_head):
                copy.problems.append(f"{name} is missing")
        elif tensor.shape != parameter.shape:
            copy.problems.append(f"{name} has shape {list(tensor.shape)}, not {list(parameter.shape)}")
        elif parameter.is_floating_point() and not tensor.is_floating_point():
            copy.problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, as in a quantised network")
        elif not tensor.isfinite().all():
            copy.problems.append(f"{name} has values that are not finite")


def _fill_head(copy: WeightsCopy, model: nn.Module, checkpoint_tensors: Mapping[str, Tensor]) -> set[str]:
    """Find the head of a copy of the weights, which may lie outside its prefix, and set the fields about the head.

    Returns:
        The names of the network's head tensors if the network keeps its own head, else an empty set.
    """
    linear_layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear_layers:
        return set()
    name, head = linear_layers[-1]
    head_names = {f"{name}.weight", f"{name}.bias"}
    if not head_names & copy.tensors.keys():
        other_layer = _find_head_outside(copy, head, checkpoint_tensors)
        if other_layer is None:
            copy.head_note = f"{copy.origin} has no head: the network keeps its own"
            copy.keeps_own_head = True
            return head_names
        copy.tensors |= {f"{name}.{kind}": checkpoint_tensors[f"{other_layer}.{kind}"] for kind in ("weight", "bias")}
        copy.tensors[f"{name}.weight"] = fit_to_shape(copy.tensors[f"{name}.weight"], head.weight.shape)
        copy.names |= {f"{name}.{kind}": f"{other_layer}.{kind}" for kind in ("weight", "bias")}
        copy.head_note = f"the head is {other_layer}"
    weight = copy.tensors.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != head.weight.shape[1]:
        return set()
    copy.num_classes = len(weight)
    if copy.num_classes == len(head.weight):
        return set()
    copy.head_note = f"the head in {copy.origin} is for another number of classes: the network keeps its own"
    copy.keeps_own_head = True
    return head_names


def _find_head_outside(copy: WeightsCopy, head: nn.Linear, checkpoint_tensors: Mapping[str, Tensor]) -> str | None:
    """Find a linear layer beside a copy that has a head's name and input size.

    Returns:
        The layer's name in the checkpoint, without `.weight`; None if there is no such layer or more than one.
    """
    container = copy.prefix[: copy.prefix.rstrip(".").rfind(".") + 1]
    layers = []
    for name, weight in checkpoint_tensors.items():
        layer, _, kind = name.rpartition(".")
        inside = name.startswith(copy.prefix) if copy.prefix else name in copy.names.values()
        if kind != "weight" or inside or not name.startswith(container) or f"{layer}.bias" not in checkpoint_tensors:
            continue
        parts = layer[len(container) :].lower().split(".")
        is_head = any(map(HEADS.search, parts)) and not any(map(AVERAGED.search, parts))
        if is_head and weight.flatten(1).shape[1] == head.in_features and weight.ndim > 1:
            layers.append(layer)
    return layers[0] if len(layers) == 1 else None


def _unexpected_names(
    copy: WeightsCopy, checkpoint_tensors: Mapping[str, Tensor], expected: Iterable[str]
) -> list[str]:
    """List the names under a copy's prefix that the network lacks.

    Only names count that begin like a part of the network, digits aside. In a Caffe2 file every name counts that is
    not solver state.
    """

    def first_part(name: str) -> str:
        return re.sub(r"\d+", "", name.split(".")[0])

    names_of_copy, first_parts = set(copy.names.values()), {first_part(name) for name in expected}
    unexpected = []
    for name in checkpoint_tensors:
        if not name.startswith(copy.prefix) or name in names_of_copy:
            continue
        unwrapped = ".".join(part for part in name[len(copy.prefix) :].split(".") if part not in WRAPPERS)
        if copy.source == "huggingface" and unwrapped.startswith("videomae.layernorm."):
            continue  # of pre-trained networks; the average over all tokens takes its place
        if (first_part(unwrapped) in first_parts) if copy.source != "caffe2" else not _is_solver_state(unwrapped):
            unexpected.append(name)
    return unexpected


def _is_solver_state(name: str) -> bool:
    """Whether a tensor of a Caffe2 file belongs to its solver."""
    return name.endswith("_momentum") or name in ("lr", "model_iter")


def fit_to_shape(tensor: Tensor, shape: torch.Size, is_position_table: bool = False) -> Tensor:
    """Inflate a 2-D kernel to a 3-D one, or add or remove dimensions of size 1 at an end, to reach `shape`.

    Inflating repeats the kernel over time and divides it by the number of repetitions. A table of positions along one
    axis is interpolated to another number of rows. A tensor of any other shape is returned unchanged.
    """
    if tensor.ndim == 4 and len(shape) == 5:
        return tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    short, long = sorted((tuple(tensor.shape), tuple(shape)), key=len)
    ones = (1,) * (len(long) - len(short))
    if long in (short + ones, ones + short):
        return tensor.reshape(shape)
    if is_position_table and tensor.shape[-1] == shape[-1]:
        return resample(tensor.flatten(0, -2), shape[0])
    return tensor


def may_be_missing(name: str, source: str, keeps_own_head: bool) -> bool:
    """Whether a copy fits without this tensor.

    True for batch counters, which nothing reads, for non-local blocks when the weights are those of an image network
    (such a block starts as the identity), and for the norm before a head that is missing too, as in pre-trained ViTs.
    """
    if name.startswith("fc_norm."):
        return keeps_own_head
    return name.endswith("num_batches_tracked") or (source == "torchvision" and ".nonlocal" in name)


def _fill_shortcut_norm(copy: WeightsCopy, state: Mapping[str, Tensor]) -> list[str]:
    """Make the batch norm that PyTorchVideo's X3D lacks the identity, if the network has it. Return a note about that.

    With a variance of 1 − eps, evaluation divides by 1.
    """
    norm = "trunk.res2.block0.shortcut_bn"
    if copy.source != "pytorchvideo" or f"{norm}.weight" not in state or f"{norm}.weight" in copy.tensors:
        return []
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1 - X3D_EPS}
    copy.tensors |= {f"{norm}.{kind}": torch.full(state[f"{norm}.{kind}"].shape, x) for kind, x in values.items()}
    return [f"{norm}, which PyTorchVideo lacks, starts as the identity (model.shortcut_norm=false leaves it out)"]


def _is_named(copy: WeightsCopy, key: str) -> bool:
    """Whether the dotted name `key` is part of a copy's prefix."""
    parts, key_parts = copy.prefix.split("."), key.strip(".").split(".")
    return any(parts[start : start + len(key_parts)] == key_parts for start in range(len(parts)))


def _describe_problems(copy: WeightsCopy) -> str:
    problems = shorten(copy.problems, MAX_LISTED_TENSORS, "; ")
    return f"{copy.origin} does not fit this network, with names of {copy.source}: {problems}"


def _describe_rest(
    chosen: WeightsCopy,
    fitting: list[WeightsCopy],
    copies: list[WeightsCopy],
    checkpoint_tensors: Mapping[str, Tensor],
    checkpoint: Any,
) -> list[str]:
    """Describe what is not loaded from a checkpoint: other copies, unused tensors and objects that were not read."""
    notes = []
    others = [copy.key or "the top level" for copy in fitting if copy is not chosen]
    if others:
        notes.append(f"other copies of this network: {', '.join(others)} (init_from_key=NAME chooses one)")
    fitting_prefixes = {copy.prefix for copy in fitting}
    for copy in {copy.prefix: copy for copy in copies if copy.prefix not in fitting_prefixes}.values():
        notes.append(f"{copy.key or 'the top level'} is skipped: {copy.problems[0]}")
    used = {name for copy in (chosen, *copies) for name in copy.names.values()}
    unused = [name for name in checkpoint_tensors if name not in used and not _is_solver_state(name.rpartition(".")[2])]
    if unused:
        notes.append(f"not used: {shorten(_group_names(unused, chosen.prefix), MAX_LISTED_GROUPS)}")
    types = sorted({_type_name(value) for value in _placeholders(checkpoint)})
    if types:
        notes.append(f"not read: objects of {', '.join(types[:MAX_LISTED_TENSORS])}")
    return notes


def _group_names(names: Iterable[str], prefix: str) -> list[str]:
    """Group tensor names by their first part that differs from `prefix`, largest group first.

    Returns:
        One text a group, its name with the number of tensors if there are several, as in `optimizer_states (586)`.
    """
    sizes: Counter[str] = Counter()
    for name in names:
        parts, path = name.split("."), prefix.split(".")
        depth = next((i for i, (a, b) in enumerate(zip(parts, path, strict=False)) if a != b), len(path))
        sizes[".".join(parts[: depth + 1])] += 1
    return [f"{name} ({size})" if size > 1 else name for name, size in sizes.most_common()]


def _placeholders(node: Any, ancestors: tuple[int, ...] = ()) -> Iterator[Placeholder]:
    """Yield the outermost placeholders of a checkpoint."""
    if isinstance(node, Placeholder):
        yield node
    elif not isinstance(node, Tensor | np.ndarray | str) and id(node) not in ancestors:
        for _, child in _items(node):
            yield from _placeholders(child, (*ancestors, id(node)))
