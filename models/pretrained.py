"""Weights from elsewhere, and ours for elsewhere.

Takes checkpoints of PySlowFast (`.pyth`, and the Caffe2 `.pkl` of its model zoo), PyTorchVideo, torchvision and our
own, and those of any trainer around one of these networks. The names of the tensors tell them apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from mgvideo.errors import UserError

from .naming import source_names
from .r2plus1d import R2Plus1D, R2Plus1DBottleneck
from .state_dicts import find_copy
from .weights_file import read_weights

log = logging.getLogger(__name__)


def load_pretrained(
    model: nn.Module,
    weights: str | PathLike[str] | Mapping[str, Any],
    source: str = "auto",
    key: str | None = None,
) -> str:
    """Set a network's weights from a file or a URL, from a checkpoint in memory, or from torchvision's by their name.

    The tensors may lie in any containers and under any prefixes, beside others. `source` says whose names they bear:
    `mgvideo`, `pyslowfast`, `caffe2`, `pytorchvideo`, `torchvision`, or `auto`. torchvision's own weights, as
    `R2Plus1D_18_Weights.KINETICS400_V1`, are downloaded. An image network's kernels are inflated (arXiv 1705.07750):
    repeated over time and divided by the number of repetitions. A head for another number of classes is left as it is,
    with a warning, and so is one that the file lacks.

    Where several copies of the network fit, one of averages over steps (ema, swa, teacher, … in its name) is taken
    before others, and then the first; `key` names another.

    Returns:
        A line for people: what was taken, from where in the file, and what was left over.

    Raises:
        UserError: the file cannot be read, or any other tensor is missing, unexpected or of another shape.
    """
    where = "the given state dict" if isinstance(weights, Mapping) else str(weights)
    copy = find_copy(model, weights if isinstance(weights, Mapping) else read_weights(weights), where, source, key)
    if copy.starts_anew:
        log.warning(copy.head)
    model.load_state_dict(copy.tensors, strict=False)
    return str(copy)


def export_pyslowfast(model: nn.Module) -> dict[str, Any]:
    """The network's weights as a PySlowFast checkpoint, for `torch.save`.

    Raises:
        UserError: PySlowFast does not have this network.
    """
    if isinstance(model, R2Plus1D):
        raise UserError("PySlowFast has no R(2+1)D of basic blocks: these weights have torchvision's names as they are")
    state = model.state_dict()
    if isinstance(model, R2Plus1DBottleneck):  # which PySlowFast takes from PyTorchVideo
        return {
            "model_state": {f"model.{name}": state[ours] for name, ours in source_names(model, "pytorchvideo").items()}
        }
    return {"model_state": {name: state[ours] for name, ours in source_names(model, "pyslowfast").items()}}
