"""Tables of configs/table as runs: compose, check, plan and price each cell before any run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from mgvideo.errors import UserError
from mgvideo.plan.forecast import total_cost
from mgvideo.plan.plan import Plan
from mgvideo.reproduce.tables import Cell, Preset, ResultTable, preset_names, read_preset, read_table

from . import app
from .build import build_plan
from .plan import clip_flops, train_videos
from .values import flatten, override_key, quote

FOLDER = "table"  # inside mgvideo.configs
# keys that change neither training nor results; `init_from` is here because recipe() compares its file name instead
IGNORED_KEYS = (
    *("output_dir", "resume", "loader", "checkpoint", "hang_timeout", "tracking", "decoder", "init_from"),
    "model_option",
)
# schedule and optimizer hold the values of `recipe.*`; `published_clip` is only for a warning
IGNORED_PREFIXES = ("train.log_every", "train.evals_per_phase", "dataset.train_videos", "recipe.", "published_clip")
DATA_PATH_KEYS = ("root", "pyramid", "frame_cache", "frame_cache_gib")
REPLACEMENTS = {"seed": "seeds=[…]", "output_dir": "out=FOLDER", "experiment": "preset=NAME"}


def _files(folder: str) -> dict[str, Any]:
    directory = files(app.CONFIGS).joinpath(folder)
    return {f.name[:-5]: f for f in sorted(directory.iterdir(), key=lambda f: f.name) if f.name.endswith(".yaml")}


def _load(kind: str, folder: str, name: str) -> Any:
    available = _files(folder)
    if name not in available:
        raise UserError(f"{kind}={name} does not exist; choose one of {', '.join(available)}")
    try:
        return yaml.safe_load(available[name].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{kind} {name}: {' '.join(str(error).split())}") from error


def presets_by_table() -> dict[str, list[str]]:
    """Return the presets of each table."""
    return {name: preset_names(_load("table", FOLDER, name), name) for name in _files(FOLDER)}


def load_table(name: str, preset: str) -> ResultTable:
    """Load a table with a preset. Raises UserError if either does not exist or its file is invalid."""
    loaded: Preset = read_preset(preset, _load("preset", f"{FOLDER}/preset", preset))
    return read_table(name, _load("table", FOLDER, name), loaded)


def merge_overrides(*lists: Sequence[str]) -> list[str]:
    """Concatenate lists of overrides; the last override of a key replaces earlier ones."""
    return list({override_key(override): override for overrides in lists for override in overrides}.values())


@dataclass
class TableEntry:
    """A cell of a table with its overrides and the config, plan and cost that they result in."""

    cell: Cell
    overrides: list[str]
    skip_reason: str | None = None  # why the cell cannot run

    @cached_property
    def config(self) -> DictConfig:
        """The composed config. Raises UserError if the overrides are invalid."""
        try:
            return app.compose_config("run", [*self.overrides, "output_dir=unused"])
        except UserError as error:
            raise UserError(f"cell {self.cell.name}: {error}") from error

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run; without the dataset, for its published number of videos."""
        return build_plan(self.config, self.train_videos[0])

    @cached_property
    def train_videos(self) -> tuple[int, tuple[str, ...]]:
        """Number of training videos, and a note if it is the published number."""
        return train_videos(self.config)

    def flops(self, plan: Plan) -> float:
        """Return the multiply-adds of the forward passes of all training clips; 0 if the cell does not train."""
        return total_cost(plan.phases, self._clip_flops) if self.config.train.enable else 0.0

    @cached_property
    def _clip_flops(self) -> Any:
        return clip_flops(self.config)

    def recipe(self) -> dict[str, Any]:
        """Return the keys that a finished run must share with this one, as a flat dict without paths to the data."""
        start = self.cell.weights_of or Path(self.config.init_from or "none").name
        keys = [str(key) for key in self.config if key != "hydra"]  # hydra has missing values
        resolved: Any = OmegaConf.to_container(OmegaConf.masked_copy(self.config, keys), resolve=True)
        config = {key: value for key, value in resolved.items() if key not in IGNORED_KEYS}  # others may refer to these
        return {
            key: value
            for key, value in flatten({"processes": self.cell.processes, "init_from": start, **config}).items()
            if not key.startswith(IGNORED_PREFIXES) and key.split(".")[-1] not in DATA_PATH_KEYS
        }


def compose_entries(table: ResultTable, shared: Sequence[str], weights: str | None) -> list[TableEntry]:
    """Compose the cells of a table with overrides for all of them. A key that a cell sets keeps the cell's value.

    Args:
        shared: overrides of the command line.
        weights: folder of released weights.

    Raises:
        UserError: every cell sets the key of a shared override, or another argument of the program replaces it.
    """
    _check_shared(table, shared)
    composed = []
    for cell in table.cells:
        overrides = merge_overrides(table.preset.common, shared, cell.overrides)
        skip_reason = cell.not_run
        released = cell.weights or table.preset.weights
        starts = any(override_key(override) == "init_from" for override in overrides)
        if released and not starts and not cell.weights_of and not skip_reason:
            path = Path(weights or ".", released.file)
            if weights and path.is_file():
                overrides.append(f"init_from={quote(path.resolve())}")
            else:
                skip_reason = f"needs {released.file} from {released.url}" + (f" in {weights}" if weights else "")
        composed.append(TableEntry(cell, overrides, skip_reason))
    return composed


def _check_shared(table: ResultTable, shared: Sequence[str]) -> None:
    cell_keys = [{override_key(override) for override in cell.overrides} for cell in table.cells if not cell.not_run]
    for override in shared:
        if cell_keys and all(override_key(override) in keys for keys in cell_keys):
            raise UserError(f"{override}: every cell of table {table.name} sets {override_key(override)} itself")
        if override_key(override) in REPLACEMENTS:
            raise UserError(f"{override}: give {REPLACEMENTS[override_key(override)]} instead")
