"""Compute the keys of `base.*` that are null, as in `recipe=folder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvideo.plan.small_recipe import LARGE_BATCH, fit_clip, fit_training


def fill_clip(cfg: DictConfig) -> None:
    """Set the keys of `base.*` and `test.crop_size` that define clips and are null, from the network's clips."""
    published = cfg.published_clip
    if published is not None and len(published) != 3:
        return  # check_values refuses it
    clip = fit_clip(published, cfg.base)
    _fill_base(cfg, clip)
    if cfg.test.crop_size is None:
        cfg.test.crop_size = fit_clip(None, {"crop_size": clip["crop_size"]})["short_side"][0]


def fill_recipe(cfg: DictConfig, dataset_size: int) -> str | None:
    """Set all keys of `base.*` that are null; return a line on those that depend on the number of videos, or None."""
    fill_clip(cfg)
    chosen = _fill_base(cfg, fit_training(dataset_size, bool(cfg.init_from), cfg.base, cfg.recipe.lr_scaling))
    if not chosen:
        return None
    values = " ".join(f"base.{key}={_format(value)}" for key, value in chosen.items())
    random = "random weights (init_from=… takes published ones)" if cfg.published_clip else "random weights"
    weights = "the weights of init_from" if cfg.init_from else random
    return f"recipe for {dataset_size} videos and {weights}: {values} (set any of them to change it)"


def _format(value: float | list[float]) -> str:
    return f"[{','.join(map(_format, value))}]" if isinstance(value, list) else f"{value:g}"


def _fill_base(cfg: DictConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set the keys of `base.*` that are null; return those."""
    is_null = {key for key in values if not OmegaConf.is_missing(cfg.base, key) and cfg.base[key] is None}
    chosen = {key: value for key, value in values.items() if key in is_null}
    for key, value in chosen.items():
        cfg.base[key] = value
    return chosen


def sample_size(cfg: DictConfig, videos: int = 0) -> int:
    """Return a dataset size of at least 1,000 batches, because a few files may be a sample of a dataset."""
    return max(videos, 1000 * (cfg.base.batch_size or LARGE_BATCH))
