"""Weights from elsewhere, and ours for elsewhere.

Reads checkpoints of PySlowFast (`.pyth`, and the Caffe2 `.pkl` of its model zoo), PyTorchVideo, torchvision and our
own, told apart by the names in them, and never runs anything that a file holds.
"""

from __future__ import annotations

import codecs
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from mgvideo.errors import UserError
from mgvideo.paths import local

from .naming import SOURCES, names
from .r2plus1d import R2Plus1D, R2Plus1DBottleneck

log = logging.getLogger(__name__)

CONTAINERS = ("model_state", "blobs", "model", "state_dict")  # where a checkpoint keeps its tensors
WRAPPERS = ("module.", "_orig_mod.", "model.")  # prefixes of DDP, torch.compile and PySlowFast's PyTorchVideo models
LISTED = 20  # so many tensors that do not fit are named, the rest are counted


def load_pretrained(
    model: nn.Module, weights: str | PathLike[str] | Mapping[str, Tensor], source: str = "auto"
) -> None:
    """Set a network's weights from a file or a URL, from tensors by name, or from torchvision's by their own name.

    `source` says whose names the tensors bear: `mgvideo`, `pyslowfast`, `caffe2`, `pytorchvideo`, `torchvision`, or
    `auto`. torchvision's own weights, as `R2Plus1D_18_Weights.KINETICS400_V1`, are downloaded. An image network's
    kernels are inflated (arXiv 1705.07750): repeated over time and divided by the number of repetitions. A head for
    another number of classes is left as it is, with a warning.

    Raises:
        UserError: the file cannot be read, or any other tensor is missing, unexpected or of another shape.
    """
    where = "the given state dict" if isinstance(weights, Mapping) else str(weights)
    given = tensors(weights if isinstance(weights, Mapping) else read(weights), where)
    if source == "auto":
        source = guess_source(model, given, where)
    if source == "caffe2":
        given = without_caffe2_extras(given)
    theirs = names(model, source)
    state = model.state_dict()
    found = {ours: fit(given[name], state[ours].shape) for name, ours in theirs.items() if name in given}
    head = head_for_other_classes(model, found)
    if head:
        log.warning("the head in %s is for another number of classes: it is left out, ours starts anew", where)
    problems = [f"{name} is unexpected" for name in given if name not in theirs]
    for name, ours in theirs.items():
        if ours not in found and not may_be_missing(ours, source):
            problems.append(f"{name} is missing")
        elif ours in found and ours not in head and found[ours].shape != state[ours].shape:
            problems.append(f"{name} is {list(found[ours].shape)} and not {list(state[ours].shape)}")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(f"{where} does not fit this network, as {source}: {'; '.join(problems[:LISTED])}{more}")
    model.load_state_dict({ours: tensor for ours, tensor in found.items() if ours not in head}, strict=False)
    log.info("read %d tensors from %s, named as %s does", len(found) - len(head), where, source)


def export_pyslowfast(model: nn.Module) -> dict[str, Any]:
    """The network's weights as a PySlowFast checkpoint, for `torch.save`.

    Raises:
        UserError: PySlowFast does not have this network.
    """
    if isinstance(model, R2Plus1D):
        raise UserError("PySlowFast has no R(2+1)D of basic blocks: these weights have torchvision's names as they are")
    state = model.state_dict()
    if isinstance(model, R2Plus1DBottleneck):  # which PySlowFast takes from PyTorchVideo
        return {"model_state": {f"model.{name}": state[ours] for name, ours in names(model, "pytorchvideo").items()}}
    return {"model_state": {name: state[ours] for name, ours in names(model, "pyslowfast").items()}}


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of plain values and NumPy arrays; whatever else it names is refused."""

    ALLOWED = {  # noqa: RUF012
        "OrderedDict": OrderedDict,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "dtype": np.dtype,
        "encode": codecs.encode,  # how Python 2 and protocol 2 write an array's bytes
        "ndarray": np.ndarray,
        "scalar": np.float32(0).__reduce__()[0],
    }
    MODULES = ("_codecs", "collections", "numpy", "numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module: str, name: str) -> Any:
        """One of the few that arrays are made with."""
        if module in self.MODULES and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read(path: str | PathLike[str]) -> Any:
    """What a checkpoint file holds, or torchvision's weights of this name.

    Raises:
        UserError: no such file or weights, or not a checkpoint, or one that holds code.
    """
    try:
        if re.fullmatch(r"\w+_Weights\.\w+", str(path)):
            return torchvision.models.get_weight(str(path)).get_state_dict(progress=False, check_hash=True)
        path = local(path)
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                content = ArraysOnly(file, encoding="latin1").load()
                if content != torch.serialization.MAGIC_NUMBER:  # with which torch's old format begins
                    return content
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read weights from {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make an unpickler raise anything
        raise UserError(f"cannot read weights from {path}: {str(error).splitlines()[0]}") from error


def tensors(checkpoint: Any, where: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without the prefixes of wrappers."""
    if isinstance(checkpoint, Mapping):
        container = next((key for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
        content = checkpoint[container] if container else checkpoint
        found = {k: torch.as_tensor(v) for k, v in content.items() if isinstance(v, Tensor | np.ndarray)}
        for prefix in WRAPPERS:
            if all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        if found:
            return found
    raise UserError(f"{where} holds no weights: none under {', '.join(CONTAINERS)}, nor at its top")


def guess_source(model: nn.Module, given: Mapping[str, Tensor], where: str) -> str:
    """The source that would give most of these names to the network's tensors."""
    shared = {source: len(names(model, source).keys() & given.keys()) for source in SOURCES}
    best = max(shared, key=lambda source: shared[source])
    if not shared[best]:
        raise UserError(
            f"{where} is of another network, or of a source that is not known: it has '{next(iter(given))}'"
        )
    return best


def without_caffe2_extras(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Caffe2 file's weights without its solver's state, its lateral connections named by their stage alone."""
    return {
        re.sub(r"^(t_res\d)_\d+(_branch2c_bn_subsample)", r"\1\2", name): tensor
        for name, tensor in given.items()
        if not name.endswith("_momentum") and name not in ("lr", "model_iter")
    }


def fit(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in the shape wanted where it is a kernel to inflate or differs by ones at the end, else as it is."""
    if tensor.ndim == 4 and len(shape) == 5:
        return tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    short, long = sorted((tuple(tensor.shape), tuple(shape)), key=len)
    if long == short + (1,) * (len(long) - len(short)):
        return tensor.reshape(shape)
    return tensor


def head_for_other_classes(model: nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """The names of the head's tensors where those found are for another number of classes, else none."""
    name, head = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    weight = found.get(f"{name}.weight")
    if weight is None or weight.shape[1:] != head.weight.shape[1:] or len(weight) == len(head.weight):
        return set()
    return {f"{name}.weight", f"{name}.bias"}


def may_be_missing(name: str, source: str) -> bool:
    """Counters that nothing reads, and the non-local blocks that an image network lacks, which begin as identities."""
    return name.endswith("num_batches_tracked") or (source == "torchvision" and ".nonlocal" in name)
