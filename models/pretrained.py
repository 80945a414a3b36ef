"""Load pretrained weights from other projects, and export ours to PySlowFast.

Loads checkpoints of PySlowFast (`.pyth`, and the Caffe2 `.pkl` of its model zoo), PyTorchVideo, torchvision, VideoMAE
(its authors' and transformers') and mgvideo, and checkpoints of other trainers that contain one of these networks. The
source is recognised by the names of the tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from mgvideo.errors import UserError

from .mvit import MViT
from .naming import source_names
from .r2plus1d import R2Plus1D, R2Plus1DBottleneck
from .state_dicts import find_copy
from .swin import Swin3D
from .vit import VisionTransformer
from .weights_file import read_weights

log = logging.getLogger(__name__)


def load_pretrained(
    model: nn.Module,
    weights: str | PathLike[str] | Mapping[str, Any],
    source: str = "auto",
    key: str | None = None,
) -> str:
    """Load weights into a network, in place.

    The tensors may lie in any containers and under any prefixes, beside other tensors. The kernels of an image network
    are inflated (arXiv 1705.07750): repeated over time and divided by the number of repetitions. If the checkpoint has
    no head, or one for another number of classes, the network keeps its own head, and a warning is logged.

    If several copies of the network fit, an average over steps (with ema, swa, teacher, … in its name) is preferred,
    then the first copy in the file.

    Args:
        model: the network.
        weights: a file, a URL, a checkpoint in memory, or the name of torchvision weights such as
            `R2Plus1D_18_Weights.KINETICS400_V1`, which are downloaded.
        source: whose tensor names the checkpoint uses: `mgvideo`, `pyslowfast`, `caffe2`, `pytorchvideo`,
            `torchvision`, `huggingface`, or `auto`.
        key: the name of the copy to load if there are several.

    Returns:
        A line for people: how many tensors were loaded, from where in the file, and what was not used.

    Raises:
        UserError: the file cannot be read, or a tensor outside the head is missing, unexpected or of another shape.
    """
    origin = "the given state dict" if isinstance(weights, Mapping) else str(weights)
    copy = find_copy(model, weights if isinstance(weights, Mapping) else read_weights(weights), origin, source, key)
    if copy.keeps_own_head:
        log.warning(copy.head_note)
    model.load_state_dict(copy.tensors, strict=False)
    return str(copy)


def export_pyslowfast(model: nn.Module) -> dict[str, Any]:
    """Return a network's weights as a PySlowFast checkpoint, for `torch.save`.

    Raises:
        UserError: PySlowFast has no such network.
    """
    if isinstance(model, R2Plus1D | Swin3D | VisionTransformer):
        raise UserError(
            f"PySlowFast has no such {type(model).__name__}: use the state dict, which has its authors' names"
        )
    state = model.state_dict()
    if isinstance(model, MViT):  # PySlowFast's tables and tokens have dimensions of size 1 before the others
        named = {name: state[ours] for name, ours in source_names(model, "pyslowfast").items()}
        tables = {
            name: tensor.reshape(1, -1, tensor.shape[-1])
            for name, tensor in named.items()
            if name.startswith(("cls_", "pos_"))
        }
        return {"model_state": named | tables}
    if isinstance(model, R2Plus1DBottleneck):  # PySlowFast uses PyTorchVideo's network
        return {
            "model_state": {f"model.{name}": state[ours] for name, ours in source_names(model, "pytorchvideo").items()}
        }
    return {"model_state": {name: state[ours] for name, ours in source_names(model, "pyslowfast").items()}}
