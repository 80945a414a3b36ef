"""What PySlowFast's keys of augmentation and mixup are here: a part of the table in `pyslowfast_keys`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .pyslowfast_rules import Rule, Settings, Translation, absent, computed, equal, no_effect, part_of

ONLY_AUGMENT_KEYS = "clips are changed only by the keys of `augment`"


def _relative_crops(key: str) -> Callable[[Any, Settings], Mapping[str, Any]]:
    def translate(value: Sequence[float], settings: Settings) -> Mapping[str, Any]:
        return {key: list(value)} if settings["DATA.TRAIN_JITTER_SCALES_RELATIVE"] and value else {}

    return translate


def _if_on(switch: str, key: str) -> Callable[[Any, Settings], Mapping[str, Any]]:
    """Return a function that translates to `key` if the key `switch` of the config is true."""
    return lambda value, settings: {key: value} if settings[switch] else {}


def _only_if_on(off: Any, because: str) -> Callable[[Any, Settings], Translation]:
    """Return a function for a key of AUG that has one value here, `off`."""

    def translate(value: Any, settings: Settings) -> Translation:
        is_same = not settings["AUG.ENABLE"] or equal(value, off)
        return Translation(reason="" if is_same else f"not there, because {because}")

    return translate


def _randaugment(policy: str, settings: Settings) -> Translation:
    """Translate a policy such as `rand-m7-n4-mstd0.5-inc1`; timm's defaults are 2 operations of magnitude 10."""
    if not settings["AUG.ENABLE"] or not policy:
        return Translation()
    name, *parts = policy.split("-")
    found = [re.fullmatch(r"(m|n|mstd|inc)([0-9.]+)", part) for part in parts]
    values = {match[1]: float(match[2]) for match in found if match}
    if name != "rand" or not all(found):
        return Translation(reason="not there, because there is RandAugment, without weights, and no other policy")
    keys = {
        "augment.randaugment_ops": int(values.get("n", 2)),
        "augment.randaugment_magnitude": values.get("m", 10.0),
        "augment.randaugment_magnitude_std": values.get("mstd", 0.0),
    }
    reason = "" if "inc" in values else "all operations here grow stronger with the magnitude, as with timm's inc1"
    return Translation(keys, reason)


AUGMENTATION_RULES: dict[str, Rule] = {
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": computed("`augment.crop_area`", _relative_crops("augment.crop_area"), []),
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": computed("`augment.crop_aspect`", _relative_crops("augment.crop_aspect"), []),
    "AUG.ENABLE": part_of("the other keys of AUG count only if it is true", False),
    "AUG.NUM_SAMPLE": computed(
        "`augment.repeat`; it multiplies `base.batch_size` too", _if_on("AUG.ENABLE", "augment.repeat"), 1
    ),
    "AUG.COLOR_JITTER": no_effect("PySlowFast itself uses it only for images; `augment.color_jitter` is for clips"),
    "AUG.AA_TYPE": computed("`augment.randaugment_ops` and its magnitude", _randaugment, "rand-m9-mstd0.5-inc1"),
    "AUG.INTERPOLATION": no_effect("geometric operations are bilinear"),
    "AUG.RE_PROB": computed("`augment.erasing_prob`", _if_on("AUG.ENABLE", "augment.erasing_prob"), 0.25),
    "AUG.RE_MODE": computed("only `pixel`", _only_if_on("pixel", "an erased part is noise in each pixel"), "pixel"),
    "AUG.RE_COUNT": computed("only `1`", _only_if_on(1, "one part is erased"), 1),
    "AUG.RE_SPLIT": computed("only `False`", _only_if_on(False, "there are no splits of a batch"), False),
    "AUG.*": absent(ONLY_AUGMENT_KEYS),
    "MIXUP.ENABLE": part_of("the other keys of MIXUP count only if it is true", False),
    "MIXUP.ALPHA": computed("`augment.mixup_alpha`", _if_on("MIXUP.ENABLE", "augment.mixup_alpha"), 0.8),
    "MIXUP.CUTMIX_ALPHA": computed("`augment.cutmix_alpha`", _if_on("MIXUP.ENABLE", "augment.cutmix_alpha"), 1.0),
    "MIXUP.PROB": computed("`augment.mix_prob`", _if_on("MIXUP.ENABLE", "augment.mix_prob"), 1.0),
    "MIXUP.SWITCH_PROB": computed("`augment.cutmix_prob`", _if_on("MIXUP.ENABLE", "augment.cutmix_prob"), 0.5),
    "MIXUP.LABEL_SMOOTH_VALUE": computed(
        "`train.label_smoothing`", _if_on("MIXUP.ENABLE", "train.label_smoothing"), 0.1
    ),
}
