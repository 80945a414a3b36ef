"""Generate the text of `--help` from the group files and the schema."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import mgvideo.configs

from .schema import RunKeys

GROUPS = ("experiment", "model", "dataset", "recipe", "schedule", "optimizer", "decoder", "launcher")


def group_options() -> dict[str, list[str]]:
    """Return the options of each config group, sorted. Options in sub-folders are named folder/name."""

    def options(folder: Path, prefix: str = "") -> list[str]:
        names: list[str] = []
        for entry in folder.iterdir():
            if entry.is_dir():
                names += options(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                names.append(prefix + entry.name.removesuffix(".yaml"))
        return sorted(names)

    root = Path(mgvideo.configs.__file__).parent
    return {group: options(root / group) for group in GROUPS if (root / group).is_dir()}


def help_text(config_name: str, description: str) -> str:
    """Return the help text: groups with their options, keys with their defaults, and flags."""
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
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(default):
            lines += [f"  {field.name}: {(type(default).__doc__ or '').strip()}"]
            lines += [_line(f"{field.name}.{f.name}", f) for f in dataclasses.fields(default)]
        elif field.metadata.get("help"):
            lines.append(_line(field.name, field))
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


def _line(name: str, field: dataclasses.Field) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    default_text = "" if default == "???" else f" [{'null' if default is None else str(default).lower()}]"
    return f"      {name:<28} {field.metadata['help']}{default_text}"
