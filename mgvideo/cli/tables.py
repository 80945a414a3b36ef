"""Tables of configs/table as runs: each cell composed, checked, planned and priced before anything starts."""

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
from mgvideo.reproduce.tables import Cell, Preset, ResultTable, presets_of, read_preset, read_table

from . import app
from .build import build_plan
from .plan import clip_flops, train_videos
from .values import quote

FOLDER = "table"  # of mgvideo.configs
# keys that change neither what is trained nor what is measured
BESIDES = ("hydra", "output_dir", "resume", "loader", "checkpoint", "hang_timeout", "decoder", "init_from")
_BESIDES_TOO = ("train.log_every", "train.evals_per_phase", "dataset.train_videos")
PLACES = ("root", "pyramid", "frame_cache", "frame_cache_gib")
INSTEAD = {"seed": "seeds=[…]", "output_dir": "out=FOLDER", "experiment": "preset=NAME"}


def _files(folder: str) -> dict[str, Any]:
    found = files(app.CONFIGS).joinpath(folder)
    return {f.name[:-5]: f for f in sorted(found.iterdir(), key=lambda f: f.name) if f.name.endswith(".yaml")}


def _load(kind: str, folder: str, name: str) -> Any:
    there = _files(folder)
    if name not in there:
        raise UserError(f"{kind}={name} does not exist; there are: {', '.join(there)}")
    try:
        return yaml.safe_load(there[name].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{kind} {name}: {' '.join(str(error).split())}") from error


def tables() -> dict[str, list[str]]:
    """The presets of each table."""
    return {name: presets_of(_load("table", FOLDER, name), name) for name in _files(FOLDER)}


def load_table(name: str, preset: str) -> ResultTable:
    """A table under a preset. Raises UserError where there is none, or its file is wrong."""
    own: Preset = read_preset(preset, _load("preset", f"{FOLDER}/preset", preset))
    return read_table(name, _load("table", FOLDER, name), own)


def key_of(override: str) -> str:
    """The key that an override sets, without the signs before it."""
    return override.partition("=")[0].lstrip("+~")


def merged(*lists: Sequence[str]) -> list[str]:
    """Overrides of several lists, of the same key the last."""
    return list({key_of(override): override for each in lists for override in each}.values())


@dataclass
class Entry:
    """A cell as it will run: its overrides, and the config that they compose."""

    cell: Cell
    overrides: list[str]
    missing: str | None = None  # why it cannot run

    @cached_property
    def config(self) -> DictConfig:
        """The composed config. Raises UserError where the overrides do not compose."""
        try:
            return app.compose_config("run", [*self.overrides, "output_dir=unused"])
        except UserError as error:
            raise UserError(f"cell {self.cell.name}: {error}") from error

    @cached_property
    def plan(self) -> Plan:
        """What it would do; without the dataset, by its published number of videos."""
        return build_plan(self.config, self.train_videos[0])

    @cached_property
    def train_videos(self) -> tuple[int, tuple[str, ...]]:
        """How many videos it trains on, and a note where the number is the published one."""
        return train_videos(self.config)

    def flops(self, plan: Plan) -> float:
        """Multiply-adds of the forward passes of all training clips of a plan; 0 where nothing is trained."""
        return total_cost(plan.phases, self._clip_flops) if self.config.train.enable else 0.0

    @cached_property
    def _clip_flops(self) -> Any:
        return clip_flops(self.config)

    def recipe(self) -> dict[str, Any]:
        """What a finished run must have in common with this one: flat, without paths to the data."""
        keys = [str(key) for key in self.config if key not in BESIDES]
        start = self.cell.weights_of or Path(self.config.init_from or "none").name
        flat: dict[str, Any] = {"processes": self.cell.processes, "init_from": start}
        _flatten("", OmegaConf.to_container(OmegaConf.masked_copy(self.config, keys), resolve=True), flat)
        return {
            key: v for key, v in flat.items() if not key.startswith(_BESIDES_TOO) and key.split(".")[-1] not in PLACES
        }


def _flatten(prefix: str, value: Any, flat: dict[str, Any]) -> None:
    for name, inner in value.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(inner, dict):
            _flatten(key, inner, flat)
        else:
            flat[key] = inner


def entries(table: ResultTable, given: Sequence[str], weights: str | None) -> list[Entry]:
    """The cells of a table with the overrides given for all of them; what a cell itself sets, it keeps.

    Raises UserError where an override is unknown, or says what every cell says for itself.
    """
    _check_given(table, given)
    made = []
    for cell in table.cells:
        overrides = merged(table.preset.common, given, cell.overrides)
        missing = cell.not_run
        released = cell.weights or table.preset.weights
        starts = any(key_of(override) == "init_from" for override in overrides)
        if released and not starts and not cell.weights_of and not missing:
            path = Path(weights or ".", released.file)
            if weights and path.is_file():
                overrides.append(f"init_from={quote(path.resolve())}")
            else:
                missing = f"needs {released.file} from {released.url}" + (f" in {weights}" if weights else "")
        made.append(Entry(cell, overrides, missing))
    return made


def _check_given(table: ResultTable, given: Sequence[str]) -> None:
    sets = [{key_of(override) for override in cell.overrides} for cell in table.cells if not cell.not_run]
    for override in given:
        if sets and all(key_of(override) in keys for keys in sets):
            raise UserError(f"{override}: every cell of table {table.name} sets {key_of(override)} itself")
        if key_of(override) in INSTEAD:
            raise UserError(f"{override}: give {INSTEAD[key_of(override)]} instead")
