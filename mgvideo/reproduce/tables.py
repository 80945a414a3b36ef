"""Definitions of result tables: cells and published results, read from YAML data with checks of every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from mgvideo.errors import UserError
from mgvideo.plan.plan import require

Block = TypeVar("Block")
# What a table's file may set for a preset.
PRESET_KEYS = frozenset({"common", "rows", "columns", "cells", "without", "published"})
# Accuracy over training time, with a point for each cell (time) or a line for each schedule (factors; with a panel for
# each row and the time to the baseline's accuracy: budgets); accuracy alone (dots); only learning curves (none).
FIGURES = ("time", "factors", "budgets", "dots", "none")


@dataclass(frozen=True)
class Published:
    """Published results of a cell, in percent, with their source."""

    source: str
    metrics: Mapping[str, float]
    setting: str = ""  # how the published setting differs from the cell's


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that a cell starts from: a path below the user's folder of weights, and the file's URL."""

    file: str
    url: str


@dataclass(frozen=True)
class Cell:
    """One entry of a table: the config overrides of a run, which is repeated for each seed.

    Cells with the same name in several tables of a preset share their runs. Speed-ups are relative to the cell of the
    same `row` whose `column` is the table's baseline.
    """

    name: str
    overrides: tuple[str, ...] = ()
    row: str = ""
    column: str = ""
    processes: int | None = None  # on one machine; None: the number that the user sets
    weights: Weights | None = None
    weights_of: str | None = None  # the cell whose weights this one starts from
    not_run: str | None = None  # why the cell cannot be run here; None: it can
    published: Published | None = None

    @property
    def title(self) -> str:
        """Row and column, for messages."""
        return ", ".join(part for part in (self.row, self.column or self.name) if part)


@dataclass(frozen=True)
class Preset:
    """Settings shared by all tables on one dataset."""

    name: str
    about: str
    common: tuple[str, ...]  # overrides of every cell
    seeds: tuple[int, ...]
    processes: int
    weights: Weights | None = None  # of every cell that sets none itself


@dataclass(frozen=True)
class ResultTable:
    """A table of results under one preset."""

    name: str
    title: str
    mirrors: str  # the table or figure of the paper that it repeats
    baseline: str  # the column that speed-ups are relative to
    figure: str  # one of `FIGURES`
    cells: tuple[Cell, ...]
    preset: Preset
    about: str = ""

    def baseline_of(self, cell: Cell) -> Cell | None:
        """Return the cell that speed-ups of `cell` are relative to, None if there is none."""
        same_row = [other for other in self.cells if other.row == cell.row]
        return next((other for other in same_row if (other.column or other.name) == self.baseline), None)


def read_preset(name: str, data: Any) -> Preset:
    """Return a preset from its file's content. Raises UserError if keys are missing or unknown."""
    where = f"preset {name}"
    return _block(Preset, {**_mapping(data, where), "name": name}, where)


def preset_names(data: Any, name: str) -> list[str]:
    """Return the names of the presets in a table file's content. Raises UserError if there is no such mapping."""
    return [
        str(preset) for preset in _mapping(_mapping(data, f"table {name}").get("presets"), f"table {name}: presets")
    ]


def read_table(name: str, data: Any, preset: Preset) -> ResultTable:
    """Return the table of a file's content under a preset.

    The file has the keys of `ResultTable`, `cells`, and under `presets` the changes of each preset: `common` (more
    overrides), `rows` and `columns` (overrides of all cells of a row or column, in this order and before their own),
    `cells` (in place of the table's), `without` (names of cells to leave out) and `published` (by cell).

    Raises:
        UserError: a key is missing or unknown, or a name refers to no cell.
    """
    where = f"table {name}"
    content = _mapping(data, where)
    known = preset_names(data, name)
    require(preset.name in known, f"{where} has no preset={preset.name}: choose one of {', '.join(known)}")
    changes = _mapping(content["presets"][preset.name], f"{where}: presets: {preset.name}")
    unknown = changes.keys() - PRESET_KEYS
    wrong = f"{where}: presets: {preset.name}: {', '.join(sorted(unknown))} is no key"
    require(not unknown, f"{wrong}; there are {', '.join(sorted(PRESET_KEYS))}")
    cell_data = changes.get("cells") or content.get("cells") or []
    require(isinstance(cell_data, list), f"{where}: cells: expected a list, not {type(cell_data).__name__}")
    cells = tuple(_block(Cell, entry, f"{where}: cells[{i}]") for i, entry in enumerate(cell_data))
    rows, columns = (_shared_overrides(changes, key, cells, where) for key in ("row", "column"))
    cells = tuple(
        replace(cell, overrides=(*rows.get(cell.row, []), *columns.get(cell.column, []), *cell.overrides))
        for cell in cells
        if cell.name not in changes.get("without", [])
    )
    preset = replace(preset, common=(*preset.common, *changes.get("common", [])))
    table_data = {key: value for key, value in content.items() if key not in ("presets", "cells")}
    table = _block(ResultTable, {**table_data, "name": name, "cells": cells, "preset": preset}, where)
    published = _mapping(changes.get("published"), f"{where}: published")
    _check_table(table, published, where)
    results = {cell: _block(Published, entry, f"{where}: published: {cell}") for cell, entry in published.items()}
    return replace(table, cells=tuple(replace(c, published=results.get(c.name, c.published)) for c in cells))


def _shared_overrides(changes: Mapping[str, Any], key: str, cells: Sequence[Cell], where: str) -> dict[str, list[str]]:
    """Return the overrides of each row or column, as `key` says. Raises UserError if one has no cell or no list."""
    shared = _mapping(changes.get(f"{key}s"), f"{where}: {key}s")
    unused = shared.keys() - {getattr(cell, key) for cell in cells}
    require(not unused, f"{where}: {key}s: there is no cell of {key} {', '.join(sorted(unused))}")
    for name, overrides in shared.items():
        require(isinstance(overrides, list), f"{where}: {key}s: {name}: expected a list of overrides")
    return shared


def _check_table(table: ResultTable, published: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a table without cells, repeated names, an unknown figure, or a reference to no cell."""
    names = [cell.name for cell in table.cells]
    require(bool(names), f"{where}: cells: none under preset={table.preset.name}")
    require(len(set(names)) == len(names), f"{where}: cells: two cells have the same name")
    require(table.figure in FIGURES, f"{where}: figure={table.figure}: choose one of {', '.join(FIGURES)}")
    for key, references in (("published", [*published]), ("weights_of", [c.weights_of for c in table.cells])):
        for name in references:
            require(name is None or name in names, f"{where}: {key}: there is no cell {name}")
    weights_of = {cell.name: cell.weights_of for cell in table.cells}
    for cell in table.cells:
        second = weights_of[cell.weights_of] if cell.weights_of else None
        require(second is None, f"{where}: {cell.name}: weights_of names a cell that has weights_of itself")


def _block(kind: type[Block], data: Any, where: str) -> Block:
    """Return a dataclass from a mapping of its fields, with lists as tuples. Raises UserError."""
    values = _mapping(data, where)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        require(key in names, f"{where}: {key} is no key; there are {', '.join(sorted(names))}")
    nested = {"published": Published, "weights": Weights}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key in nested and isinstance(value, dict):
            arguments[key] = _block(nested[key], value, f"{where}: {key}")
        else:
            arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**arguments)
    except TypeError as error:  # its message names the missing field
        raise UserError(f"{where}: {str(error).partition(') ')[2]}") from error


def _mapping(data: Any, where: str) -> dict[str, Any]:
    """Return a mapping, empty for None. Raises UserError for other types."""
    require(data is None or isinstance(data, dict), f"{where}: expected keys with values, not {type(data).__name__}")
    return data or {}
