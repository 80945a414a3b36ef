"""Keys that a program takes besides those of a run: typed dataclasses of `schema.key` fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgvideo.errors import UserError
from mgvideo.storage.paths import require_local_path

from .values import declares_text, read_dotlist

Keys = TypeVar("Keys")


def split(keys: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that set a key of the dataclass, and all others."""
    own = [argument for argument in arguments if argument.split("=")[0] in names(keys) and "=" in argument]
    return own, [argument for argument in arguments if argument not in own]


def read(keys: type[Keys], overrides: Sequence[str]) -> Keys:
    """The dataclass with `key=value` overrides. Raises UserError for a value of the wrong type, and a URL as `out`."""
    types = {field.name: str(field.type) for field in fields(keys)}  # type: ignore[arg-type]
    try:
        given = OmegaConf.merge(
            OmegaConf.structured(keys), read_dotlist(overrides, lambda name: declares_text(types[name]))
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    read: Any = OmegaConf.to_object(given)
    if getattr(read, "out", None) is not None:
        read.out = require_local_path("out", read.out)
    return read


def names(keys: type) -> list[str]:
    """The names of a program's keys."""
    return [field.name for field in fields(keys)]


def describe(keys: type) -> list[str]:
    """A line of help for each key, with its default."""
    defaults = keys()
    width = max(10, *(len(f.name) for f in fields(keys)))
    return [f"  {f.name:<{width}} {f.metadata['help']} [{_shown(getattr(defaults, f.name))}]" for f in fields(keys)]


def _shown(default: object) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
