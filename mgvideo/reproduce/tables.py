"""What a table of results is: cells that belong together, and what is published of them. Plain data, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from mgvideo.errors import UserError
from mgvideo.plan.plan import require

Block = TypeVar("Block")
# accuracy over training time, a point a cell or a line a schedule; accuracy alone; nothing but learning curves
FIGURES = ("time", "factors", "dots", "none")


@dataclass(frozen=True)
class Published:
    """Figures that others have published of the same cell, in percent, and who."""

    source: str
    metrics: Mapping[str, float]
    setting: str = ""  # in which it differs from ours


@dataclass(frozen=True)
class Weights:
    """A released file that a cell starts from, named below the user's folder of weights."""

    file: str
    url: str


@dataclass(frozen=True)
class Cell:
    """One entry of a table: overrides of a run, repeated for each seed.

    The same name in another table of the preset is the same run. Speed-ups are against the cell of the same `row` whose
    `column` is the table's baseline.
    """

    name: str
    overrides: tuple[str, ...] = ()
    row: str = ""
    column: str = ""
    processes: int | None = None  # of one machine; None: as many as the user says
    weights: Weights | None = None
    weights_of: str | None = None  # the cell whose weights this one starts from
    not_run: str | None = None  # why nothing here can run it
    published: Published | None = None

    @property
    def title(self) -> str:
        """Row and column in words."""
        return ", ".join(part for part in (self.row, self.column or self.name) if part)


@dataclass(frozen=True)
class Preset:
    """What all tables on one dataset share."""

    name: str
    about: str
    common: tuple[str, ...]  # overrides of every cell
    seeds: tuple[int, ...]
    processes: int
    weights: Weights | None = None  # of every cell that does not say otherwise


@dataclass(frozen=True)
class ResultTable:
    """A table under one preset."""

    name: str
    title: str
    mirrors: str  # what of the paper
    baseline: str  # column that speed-ups are measured against
    figure: str
    cells: tuple[Cell, ...]
    preset: Preset
    about: str = ""

    def baseline_of(self, cell: Cell) -> Cell | None:
        """The cell that speed-ups of this one are measured against."""
        same_row = [other for other in self.cells if other.row == cell.row]
        return next((other for other in same_row if (other.column or other.name) == self.baseline), None)


def read_preset(name: str, data: Any) -> Preset:
    """A preset from its file's content. Raises UserError where it is not one."""
    where = f"preset {name}"
    return _block(Preset, {**_mapping(data, where), "name": name}, where)


def presets_of(data: Any, name: str) -> list[str]:
    """The presets that a table's file has."""
    return [
        str(preset) for preset in _mapping(_mapping(data, f"table {name}").get("presets"), f"table {name}: presets")
    ]


def read_table(name: str, data: Any, preset: Preset) -> ResultTable:
    """A table from its file's content, as it is under a preset.

    The file holds a table's own keys, `cells`, and for each preset what it changes: `common` (more overrides), `cells`
    (others), `without` (names of those left out) and `published` (by cell). Raises UserError where something is missing
    or unknown.
    """
    where = f"table {name}"
    content = _mapping(data, where)
    known = presets_of(data, name)
    require(preset.name in known, f"{where} has no preset={preset.name}: choose one of {', '.join(known)}")
    own = _mapping(content["presets"][preset.name], f"{where}: presets: {preset.name}")
    unknown = own.keys() - {"common", "cells", "without", "published"}
    require(not unknown, f"{where}: presets: {preset.name}: {', '.join(sorted(unknown))} is no key")
    given = own.get("cells") or content.get("cells") or []
    require(isinstance(given, list), f"{where}: cells: give a list")
    cells = tuple(_block(Cell, entry, f"{where}: cells[{i}]") for i, entry in enumerate(given))
    cells = tuple(cell for cell in cells if cell.name not in own.get("without", []))
    preset = replace(preset, common=(*preset.common, *own.get("common", [])))
    rest = {key: value for key, value in content.items() if key not in ("presets", "cells")}
    table = _block(ResultTable, {**rest, "name": name, "cells": cells, "preset": preset}, where)
    published = _mapping(own.get("published"), f"{where}: published")
    _check(table, published, where)
    figures = {cell: _block(Published, entry, f"{where}: published: {cell}") for cell, entry in published.items()}
    return replace(table, cells=tuple(replace(c, published=figures.get(c.name, c.published)) for c in cells))


def _check(table: ResultTable, published: Mapping[str, Any], where: str) -> None:
    names = [cell.name for cell in table.cells]
    require(bool(names), f"{where}: cells: there are none under preset={table.preset.name}")
    require(len(set(names)) == len(names), f"{where}: cells: two have the same name")
    require(table.figure in FIGURES, f"{where}: figure={table.figure}: choose one of {', '.join(FIGURES)}")
    for word, refers in (("published", [*published]), ("weights_of", [c.weights_of for c in table.cells])):
        for name in refers:
            require(name is None or name in names, f"{where}: {word}: there is no cell {name}")
    starts = {cell.name: cell.weights_of for cell in table.cells}
    for cell in table.cells:
        further = starts[cell.weights_of] if cell.weights_of else None
        require(further is None, f"{where}: {cell.name}: weights of a cell that itself starts from another's")


def _block(kind: type[Block], data: Any, where: str) -> Block:
    """A dataclass from a mapping of its fields, lists as tuples."""
    values = _mapping(data, where)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        require(key in names, f"{where}: {key} is no key of it; there are {', '.join(sorted(names))}")
    inner = {"published": Published, "weights": Weights}
    made = {
        key: _block(inner[key], value, f"{where}: {key}") if key in inner and isinstance(value, dict) else _plain(value)
        for key, value in values.items()
    }
    try:
        return kind(**made)
    except TypeError as error:  # it names the field that is missing
        raise UserError(f"{where}: {str(error).partition(') ')[2]}") from error


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _mapping(data: Any, where: str) -> dict[str, Any]:
    require(data is None or isinstance(data, dict), f"{where}: give keys with values, not {type(data).__name__}")
    return data or {}
