"""The tensor names of our networks in PySlowFast, its Caffe2 model zoo, PyTorchVideo and torchvision.

A source is a list of rules that rewrite our names to its names. To load a checkpoint, the rules are applied to the
names of the network: the result is the names that the file must contain.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from mgvideo.errors import UserError

Rules = list[tuple[str, str]]  # (regular expression, replacement) pairs, applied in this order

STAGES = range(4)  # a fusion follows the stem and each stage except the last

PYSLOWFAST: Rules = [
    (r"^(?:trunk|slow)\.", "pathway0."),
    (r"^fast\.", "pathway1."),
    (r"^(pathway\d)\.stem\.", r"s1.\1_stem."),
    (r"^(pathway\d)\.res(\d)\.block(\d+)\.", r"s\2.\1_res\3."),
    (r"^(pathway\d)\.res(\d)\.nonlocal(\d+)\.bn", r"s\2.\1_nonlocal\3.bn"),
    (r"^(pathway\d)\.res(\d)\.nonlocal(\d+)\.", r"s\2.\1_nonlocal\3.conv_"),
    (r"\.conv_([abc])\.", r".branch2.\1."),
    (r"\.bn_([abc])\.", r".branch2.\1_bn."),
    (r"\.shortcut\.", ".branch1."),
    (r"\.shortcut_bn\.", ".branch1_bn."),
    *((rf"^fusions\.{i}\.conv", f"s{i + 1}_fuse.conv_f2s") for i in STAGES),
    *((rf"^fusions\.{i}\.bn", f"s{i + 1}_fuse.bn") for i in STAGES),
    (r"^head\.fc", "head.projection"),
]

CAFFE2: Rules = [
    *PYSLOWFAST,
    (r"^s1\.pathway0_stem\.conv", "conv1"),
    (r"^s1\.pathway0_stem\.bn", "res_conv1_bn"),
    (r"^s1\.pathway1_stem\.conv", "t_conv1"),
    (r"^s1\.pathway1_stem\.bn", "t_res_conv1_bn"),
    (r"\.branch2\.([abc])", r".branch2\1"),
    (r"^s(\d)\.pathway0_res(\d+)\.", r"res\1_\2_"),
    (r"^s(\d)\.pathway1_res(\d+)\.", r"t_res\1_\2_"),
    (r"^s(\d)\.pathway0_nonlocal(\d+)\.(?:conv_)?", r"nonlocal_conv\1_\2_"),
    (r"^s1_fuse\.conv_f2s", "t_pool1_subsample"),
    (r"^s1_fuse\.bn", "t_pool1_subsample_bn"),
    (r"^s(\d)_fuse\.conv_f2s", r"t_res\1_branch2c_bn_subsample"),
    (r"^s(\d)_fuse\.bn", r"t_res\1_branch2c_bn_subsample_bn"),
    (r"^head\.projection", "pred"),
    (r"bn\.weight$", "bn_s"),
    (r"\.weight$", "_w"),
    (r"\.bias$", "_b"),
    (r"\.running_mean$", "_rm"),
    (r"\.running_var$", "_riv"),
]

# For ImageNet's ResNet. Our R(2+1)D already has torchvision's names, which these rules leave unchanged.
TORCHVISION: Rules = [
    (r"^trunk\.stem\.conv\.", "conv1."),
    (r"^trunk\.stem\.bn\.", "bn1."),
    *((rf"^trunk\.res{i}\.block(\d+)\.", rf"layer{i - 1}.\1.") for i in range(2, 6)),
    *((rf"\.(conv|bn)_{letter}\.", rf".\g<1>{i}.") for i, letter in enumerate("abc", start=1)),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.shortcut_bn\.", ".downsample.1."),
    (r"^head\.fc", "fc"),
]


def pytorchvideo_rules(model: nn.Module) -> Rules:
    """Return the rules for PyTorchVideo, which numbers all parts of a network in one list, pooling layers included."""
    branches = {"trunk": "", "slow": ".multipathway_blocks.0", "fast": ".multipathway_blocks.1"}
    pathways = [name for name in branches if hasattr(model, name)]
    rules: Rules = []
    parts = 0
    for name in pathways:
        for i, (part, _) in enumerate(model.get_submodule(name).named_children()):
            rules.append((rf"^{name}\.{part}\.block(\d+)\.", rf"blocks.{i}{branches[name]}.res_blocks.\1."))
            rules.append((rf"^{name}\.{part}\.", rf"blocks.{i}{branches[name]}."))
            parts = i + 1
    head = parts if len(pathways) == 1 else parts + 1  # PyTorchVideo numbers SlowFast's pooling separately
    return [
        *rules,
        (r"^fusions\.(\d)\.conv", r"blocks.\1.multipathway_fusion.conv_fast_to_slow"),
        (r"^fusions\.(\d)\.bn", r"blocks.\1.multipathway_fusion.norm"),
        (r"(^blocks\..*)\.bn\.", r"\1.norm."),
        (r"\.conv_([abc])\.", r".branch2.conv_\1."),
        (r"\.bn_([abc])\.", r".branch2.norm_\1."),
        (r"\.shortcut\.", ".branch1_conv."),
        (r"\.shortcut_bn\.", ".branch1_norm."),
        (r"^head\.fc", f"blocks.{head}.proj"),
    ]


SOURCES: dict[str, Callable[[nn.Module], Rules]] = {
    "mgvideo": lambda model: [],
    "pyslowfast": lambda model: PYSLOWFAST,
    "caffe2": lambda model: CAFFE2,
    "pytorchvideo": pytorchvideo_rules,
    "torchvision": lambda model: TORCHVISION,
}


def source_names(model: nn.Module, source: str) -> dict[str, str]:
    """Return the names of a network's tensors in a source: its name → our name, for every tensor of the state dict.

    Raises `UserError` for an unknown source.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source '{source}' of weights: choose auto or one of {', '.join(SOURCES)}")
    rules = SOURCES[source](model)
    ours_by_theirs = {}
    for ours in model.state_dict():
        theirs = ours
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        ours_by_theirs[theirs] = ours
    return ours_by_theirs
