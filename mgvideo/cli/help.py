"""Generate the text of `--help` from the group files and the schema."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from omegaconf import DictConfig, ListConfig, OmegaConf

from .schema import RunKeys
from .yaml_keys import CONFIGS, find_option, read_option_keys, read_summary

GROUPS = ("experiment", "model", "dataset", "recipe", "schedule", "optimizer", "augment", "decoder", "launcher")
GROUPS_WITH_KEYS = ("model", "dataset", "schedule", "optimizer", "decoder", "launcher")


def group_options() -> dict[str, list[str]]:
    """Return the options of each config group, sorted. Options in sub-folders are named folder/name."""
    return {group: options_in(CONFIGS / group) for group in GROUPS}


def options_in(folder: Path, prefix: str = "") -> list[str]:
    """Return the names of the options in a folder, sorted. Options in sub-folders are named folder/name."""
    names: list[str] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            names += options_in(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            names.append(prefix + entry.name.removesuffix(".yaml"))
    return sorted(names)


def help_text(description: str, cfg: DictConfig) -> str:
    """Return the help text: groups with their options, keys with their values in brackets, and flags.

    `cfg` is the config of the command line, with Hydra's own keys. The keys of its chosen options are listed.
    """
    lines = [
        description,
        "",
        "Usage: … [group=option] [key=value] …   for example",
        "  python tools/run_net.py model=i3d_r50 dataset=kinetics400 dataset.root=/data/k400 schedule=multigrid",
        "",
        "Groups (recipe: by default that which the dataset's file names, else finetune)",
    ]
    for group, options in group_options().items():
        lines += [
            f"  {group}=",
            *textwrap.wrap(" ".join(options), 100, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    lines += ["", "Keys (defaults in brackets; recipes and experiments change some; --cfg job shows the result)"]
    for field in dataclasses.fields(RunKeys):
        default = default_of(field)
        if dataclasses.is_dataclass(default):
            lines += [f"  {field.name}: {(type(default).__doc__ or '').strip()}"]
            lines += [
                _line(f"{field.name}.{f.name}", f.metadata["help"], default_of(f)) for f in dataclasses.fields(default)
            ]
        elif field.metadata.get("help"):
            lines.append(_line(field.name, field.metadata["help"], default))
    lines += ["", "Keys of the chosen options (values in brackets; add other options to --help to see their keys)"]
    lines += _keys_of_choices(cfg)
    lines += [
        "",
        "Flags",
        "  --help                 print this text",
        "  --cfg job              print the composed config and exit",
        "  --multirun, -m         run every combination of comma-separated values, such as schedule=baseline,multigrid",
        "",
        "Several processes: torchrun --nproc-per-node=2 tools/run_net.py …",
    ]
    return "\n".join(lines)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a dataclass field."""
    return field.default_factory() if callable(field.default_factory) else field.default


def format_value(value: Any) -> str:
    """Return a config value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {format_value(inner)}' for key, inner in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def in_brackets(value: Any) -> str:
    """Return a config value in brackets, as help texts show defaults; a list has its own."""
    text = format_value(value)
    return text if isinstance(value, list) else f"[{text}]"


def _line(name: str, text: str, value: Any) -> str:
    shown = "" if value == "???" else in_brackets(value)
    return f"      {name:<28} {' '.join(part for part in (text, shown) if part)}"


def _keys_of_choices(cfg: DictConfig) -> Iterator[str]:
    """Yield the lines of each chosen option, and of its keys with their values in the config."""
    folders = [*_search_folders(cfg), CONFIGS]
    for group in GROUPS_WITH_KEYS:
        choice = cfg.hydra.runtime.choices.get(group)
        file = find_option(f"{group}/{choice}", folders) if choice else None
        if file is None:
            continue
        yield "  " + ": ".join(part for part in (f"{group}={choice}", read_summary(file)) if part)
        for key in read_option_keys(f"{group}/{choice}", folders).values():
            yield _line(key.name, key.comment, _raw_value(cfg, key.name))


def _search_folders(cfg: DictConfig) -> list[Path]:
    """Return the local folders of `hydra.searchpath`."""
    paths = [str(path) for path in cfg.hydra.searchpath]
    return [Path(unquote(path.removeprefix("file://"))) for path in paths if not path.startswith("pkg://")]


def _raw_value(cfg: DictConfig, name: str) -> Any:
    """Return the value of a key, resolved only if it is a value of the recipe; `???` if it is not set."""
    parent_name, _, key = name.rpartition(".")
    parent: Any = OmegaConf.select(cfg, parent_name)
    node = parent._get_node(key) if isinstance(parent, DictConfig) else None
    if isinstance(node, DictConfig | ListConfig) and not (node._is_none() or node._is_interpolation()):
        return OmegaConf.to_container(node, resolve=False)
    value = "???" if node is None else node._value()
    return OmegaConf.select(cfg, name) if str(value).startswith("${recipe.") else value
