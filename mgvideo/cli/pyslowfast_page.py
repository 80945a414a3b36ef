"""Write the tables of docs/pyslowfast.md from the rules of `mgvideo from_pyslowfast`.

Run it by `make docs`. The text above `MARKER` in the page is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .pyslowfast_keys import RULES, find_rule

PAGE = Path(__file__).parents[2] / "docs/pyslowfast.md"
MARKER = "<!-- `make docs` writes everything below from mgvideo/cli/pyslowfast_keys.py. Edit that. -->"
# recipe → its keys, by block; a key is in the table of the first recipe that has it
RECIPES = {
    "SLOWFAST_8x8_R50_stepwise_multigrid.yaml": {
        "MULTIGRID": "SHORT_CYCLE LONG_CYCLE",
        "TRAIN": "ENABLE DATASET BATCH_SIZE EVAL_PERIOD CHECKPOINT_PERIOD AUTO_RESUME",
        "DATA": "NUM_FRAMES SAMPLING_RATE TRAIN_JITTER_SCALES TRAIN_CROP_SIZE TEST_CROP_SIZE INPUT_CHANNEL_NUM",
        "SLOWFAST": "ALPHA BETA_INV FUSION_CONV_CHANNEL_RATIO FUSION_KERNEL_SZ",
        "RESNET": (
            "ZERO_INIT_FINAL_BN WIDTH_PER_GROUP NUM_GROUPS DEPTH TRANS_FUNC STRIDE_1X1 NUM_BLOCK_TEMP_KERNEL "
            "SPATIAL_STRIDES SPATIAL_DILATIONS"
        ),
        "NONLOCAL": "LOCATION GROUP INSTANTIATION",
        "BN": "USE_PRECISE_STATS NUM_BATCHES_PRECISE MOMENTUM WEIGHT_DECAY",
        "SOLVER": (
            "BASE_LR LR_POLICY LRS STEPS MAX_EPOCH MOMENTUM WEIGHT_DECAY WARMUP_EPOCHS WARMUP_START_LR "
            "OPTIMIZING_METHOD"
        ),
        "MODEL": "NUM_CLASSES ARCH MODEL_NAME LOSS_FUNC DROPOUT_RATE",
        "TEST": "ENABLE DATASET BATCH_SIZE",
        "DATA_LOADER": "NUM_WORKERS PIN_MEMORY",
        "": "NUM_GPUS NUM_SHARDS RNG_SEED OUTPUT_DIR",
    },
    "X3D_M.yaml": {
        "X3D": "WIDTH_FACTOR DEPTH_FACTOR BOTTLENECK_FACTOR DIM_C5 DIM_C1",
        "TEST": "NUM_SPATIAL_CROPS",
        "DATA": "DECODING_BACKEND",
        "SOLVER": "BASE_LR_SCALE_NUM_SHARDS",
    },
    "MVITv2_S_16x4.yaml": {
        "DATA": "USE_OFFSET_SAMPLING TRAIN_JITTER_SCALES_RELATIVE TRAIN_JITTER_ASPECT_RELATIVE",
        "MVIT": (
            "ZERO_DECAY_POS_CLS USE_ABS_POS REL_POS_SPATIAL REL_POS_TEMPORAL DEPTH NUM_HEADS EMBED_DIM PATCH_KERNEL "
            "PATCH_STRIDE PATCH_PADDING MLP_RATIO QKV_BIAS DROPPATH_RATE NORM MODE CLS_EMBED_ON DIM_MUL HEAD_MUL "
            "POOL_KVQ_KERNEL POOL_KV_STRIDE_ADAPTIVE POOL_Q_STRIDE DROPOUT_RATE DIM_MUL_IN_ATT RESIDUAL_POOLING"
        ),
        "AUG": "ENABLE NUM_SAMPLE COLOR_JITTER AA_TYPE INTERPOLATION RE_PROB RE_MODE RE_COUNT RE_SPLIT",
        "MIXUP": "ENABLE ALPHA CUTMIX_ALPHA PROB SWITCH_PROB LABEL_SMOOTH_VALUE",
        "SOLVER": "ZERO_WD_1D_PARAM CLIP_GRAD_L2NORM COSINE_AFTER_WARMUP COSINE_END_LR",
        "TEST": "NUM_ENSEMBLE_VIEWS",
    },
}


def main() -> None:
    """Write the page again."""
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def make_page(old_page: str) -> str:
    """Return the page: the text above `MARKER` in `old_page`, then a table for each recipe and one of other keys."""
    head = old_page.partition(MARKER)[0].rstrip()
    lines = [head, "", MARKER]
    shown: set[str] = set()
    for recipe, blocks in RECIPES.items():
        title = f"Keys of {recipe}" if not shown else f"More keys of {recipe}"
        keys = [f"{block}.{name}".lstrip(".") for block, names in blocks.items() for name in names.split()]
        lines += ["", f"## {title}", "", *_table(keys)]
        shown |= {*keys}
    lines += ["", "## Other keys", "", *_table(key for key in RULES if key not in shown)]
    return "\n".join(lines) + "\n"


def _table(keys: Iterable[str]) -> Iterator[str]:
    """Yield a table of keys and what they are here; neighbours that are the same here share a row."""
    yield from ("| PySlowFast | mgvideo |", "| --- | --- |")
    group: list[str] = []
    text = ""
    for key in keys:
        rule = find_rule(key)
        assert rule is not None, key
        if group and rule.text != text:
            yield f"| {', '.join(group)} | {text} |"
            group = []
        group, text = [*group, f"`{key}`"], rule.text
    yield f"| {', '.join(group)} | {text} |"


if __name__ == "__main__":
    main()
