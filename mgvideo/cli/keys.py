"""Read the keys that a program has besides those of a run: a dataclass of `schema.key` fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgvideo.errors import UserError
from mgvideo.storage.paths import require_local_path

from .help import in_brackets
from .schema import check_value
from .values import declares_text, read_dotlist

Keys = TypeVar("Keys")


def split(keys_class: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that set a key of the dataclass, and the rest."""
    program_arguments = [
        argument for argument in arguments if argument.split("=")[0] in names(keys_class) and "=" in argument
    ]
    return program_arguments, [argument for argument in arguments if argument not in program_arguments]


def read(keys_class: type[Keys], overrides: Sequence[str]) -> Keys:
    """Return an instance of the dataclass with `key=value` overrides.

    Raises:
        UserError: A value has the wrong type or is outside its limits, or `out` is a URL.
    """
    types = {field.name: str(field.type) for field in fields(keys_class)}  # type: ignore[arg-type]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(keys_class), read_dotlist(overrides, lambda name: declares_text(types[name]))
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    values: Any = OmegaConf.to_object(merged)
    for field in fields(keys_class):  # type: ignore[arg-type]
        check_value(field.name, getattr(values, field.name), field.metadata["limits"])
    if getattr(values, "out", None) is not None:
        values.out = require_local_path("out", values.out)
    return values


def names(keys_class: type) -> list[str]:
    """Return the names of a program's keys."""
    return [field.name for field in fields(keys_class)]


def describe(keys_class: type) -> list[str]:
    """Return a line of help for each key, with its default."""
    defaults = keys_class()
    width = max(10, *(len(f.name) for f in fields(keys_class)))
    return [
        f"  {f.name:<{width}} {f.metadata['help']} {in_brackets(getattr(defaults, f.name))}" for f in fields(keys_class)
    ]
