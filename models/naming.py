"""The tensor names of our networks in PySlowFast, its Caffe2 model zoo, PyTorchVideo, torchvision and transformers.

A source is a list of rules that rewrite our names to its names. To load a checkpoint, the rules are applied to the
names of the network: the result is the names that the file must contain.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from mgvideo.errors import UserError

from .x3d import X3D

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
    (r"\.se\.", ".branch2.se."),  # this line and the next two: X3D
    (r"^head\.(conv|lin)\.", r"head.\1_5."),
    (r"^head\.bn\.", "head.conv_5_bn."),
]

PYSLOWFAST_MVIT: Rules = [
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^pos_encoding\.class_token$", "cls_token"),
    (r"^pos_encoding\.(spatial|temporal|class)_pos$", r"pos_embed_\1"),
    (r"\.attn\.project\.0\.", ".attn.proj."),
    (r"\.attn\.pool_([qkv])\.pool\.", r".attn.pool_\1."),
    (r"\.attn\.pool_([qkv])\.norm_act\.0\.", r".attn.norm_\1."),
    (r"^(blocks\.\d+)\.project\.", r"\1.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.1\.", "head.projection."),
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

# VideoMAE's ViT. Queries, keys and values are concatenated first: see `state_dicts.fuse_attention`.
HUGGINGFACE: Rules = [
    (r"^patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "videomae.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.attention."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^head\.", "classifier."),
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
    if isinstance(model, X3D):
        # PyTorchVideo's stem has the two names the wrong way round, and squeeze-and-excitation belongs to the norm
        rules += [
            (r"^blocks\.0\.conv\.", "blocks.0.conv.conv_xy."),
            (r"^blocks\.0\.conv_xy\.", "blocks.0.conv.conv_t."),
            (r"^(blocks\..*)\.bn_b\.", r"\1.branch2.norm_b.0."),
            (r"^(blocks\..*)\.se\.fc1\.", r"\1.branch2.norm_b.1.block.0."),
            (r"^(blocks\..*)\.se\.fc2\.", r"\1.branch2.norm_b.1.block.2."),
            (r"^head\.conv\.", f"blocks.{head}.pool.pre_conv."),
            (r"^head\.bn\.", f"blocks.{head}.pool.pre_norm."),
            (r"^head\.lin\.", f"blocks.{head}.pool.post_conv."),
        ]
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
    "pyslowfast": lambda model: PYSLOWFAST_MVIT if hasattr(model, "pos_encoding") else PYSLOWFAST,
    "caffe2": lambda model: CAFFE2,
    "pytorchvideo": pytorchvideo_rules,
    "torchvision": lambda model: TORCHVISION,
    "huggingface": lambda model: HUGGINGFACE,
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
