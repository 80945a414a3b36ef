"""Read keys, values and comments of YAML files in the config groups, for `--help` and docs/configuration.md.

The comment of a key is at the end of its line, or else in the lines directly above it. A key without a comment takes
the one of the file or mapping that it overrides: one that `defaults` names, or one that `<<` merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import mgvideo.configs

CONFIGS = Path(mgvideo.configs.__file__).parent
HIDDEN_KEYS = ("_target_", "_convert_", "defaults", "name")  # not for users to set
GLOBAL_PACKAGE = "# @package _global_"  # first line of an option whose keys have no prefix
_REFERENCE = re.compile(r"""["']?\$\{[\w.]+\}["']?""")  # a value that is only that of another key


@dataclass(frozen=True)
class YamlKey:
    """A key of a YAML file: its dotted name on the command line, its value as the file has it, and its comment."""

    name: str
    value: str
    comment: str = ""


def find_option(option: str, folders: Sequence[Path] = (CONFIGS,)) -> Path | None:
    """Return the file of an option (`model/i3d_r50`) in the first of the folders that has it, or None."""
    files = (folder / f"{option}.yaml" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def read_summary(file: Path) -> str:
    """Return the first paragraph of the comment at the top of a file; empty if there is none."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line != GLOBAL_PACKAGE]
    end = next((i for i, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return " ".join(line[2:].strip() for line in lines[:end])


def read_choices(file: Path) -> dict[str, str]:
    """Return the options that the `defaults` of a file choose in other groups: group → option."""
    entries = [entry for entry in _defaults(file) if isinstance(entry, dict)]
    return {
        name.removeprefix("override ").removeprefix("/"): str(option)
        for entry in entries
        for name, option in entry.items()
        if option is not None
    }


def read_option_keys(option: str, folders: Sequence[Path] = (CONFIGS,)) -> dict[str, YamlKey]:
    """Return the keys that an option (`model/i3d_r50`) has and a user may set, by name.

    Keys that only refer to another key and have no comment are left out.
    """
    file = find_option(option, folders)
    if file is None:
        return {}
    is_global = file.read_text(encoding="utf-8").startswith(GLOBAL_PACKAGE)
    keys = _read_with_defaults(file, "" if is_global else f"{option.split('/')[0]}.", folders)
    return {name: key for name, key in keys.items() if key.comment or not _REFERENCE.fullmatch(key.value)}


def read_file_keys(file: Path, prefix: str = "") -> dict[str, YamlKey]:
    """Return the keys of one file, without those of its `defaults`, by dotted name with `prefix`."""
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return _read_mapping(root, prefix, text) if isinstance(root, yaml.MappingNode) else {}


def _defaults(file: Path) -> list[Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content.get("defaults") or [] if isinstance(content, dict) else []


def _read_with_defaults(file: Path, prefix: str, folders: Sequence[Path]) -> dict[str, YamlKey]:
    """Return the keys of a file and of the files that its `defaults` name, which it overrides."""
    base: dict[str, YamlKey] = {}
    group = next(file.parent.relative_to(folder) for folder in folders if file.is_relative_to(folder))
    for entry in _defaults(file):
        if not isinstance(entry, str) or entry == "_self_":
            continue
        name = entry.partition("@")[0]
        path = find_option(name[1:] if name.startswith("/") else str(group / name), folders)
        if path is not None:
            base = _override(base, _read_with_defaults(path, prefix, folders))
    return _override(base, read_file_keys(file, prefix))


def _read_mapping(node: yaml.MappingNode, prefix: str, text: str) -> dict[str, YamlKey]:
    base: dict[str, YamlKey] = {}
    own: dict[str, YamlKey] = {}
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        if _is_merge(key_node):
            base = _override(base, _read_mapping(value_node, prefix, text))
        elif _has_keys(value_node):
            own |= _read_mapping(value_node, f"{name}.", text)
        elif key_node.value not in HIDDEN_KEYS:
            start, end = value_node.start_mark.index, value_node.end_mark.index
            own[name] = YamlKey(name, text[start:end].strip(), _comment(text, key_node.start_mark, end))
    return _override(base, own)


def _is_merge(key_node: yaml.Node) -> bool:
    return key_node.tag == "tag:yaml.org,2002:merge"


def _has_keys(node: yaml.Node) -> bool:
    """Return whether a node holds keys of its own. Else it is a value, as `{res4: [1, 3]}` in braces is."""
    if not isinstance(node, yaml.MappingNode):
        return False
    return not node.flow_style or any(_is_merge(key) or key.value == "_target_" for key, _ in node.value)


def _comment(text: str, start: yaml.Mark, end: int) -> str:
    """Return the comment of the key that begins at `start` and whose value ends at index `end`."""
    trailing = re.match(r"[ ]*#[ ]*(.*)", text[end:])
    if trailing:
        return trailing[1].strip()
    lines = text.splitlines()[: start.line]
    indent = " " * start.column
    above: list[str] = []
    while lines and lines[-1].startswith(f"{indent}# "):
        above.insert(0, lines.pop()[len(indent) + 2 :].strip())
    return " ".join(above) if any(line.strip() for line in lines) else ""  # else it is the comment on the whole file


def _override(base: Mapping[str, YamlKey], own: Mapping[str, YamlKey]) -> dict[str, YamlKey]:
    """Return the keys of both, with the values of `own`; comments that `own` lacks come from `base`."""
    commented = {
        name: replace(key, comment=key.comment or (base[name].comment if name in base else ""))
        for name, key in own.items()
    }
    return commented | {name: key for name, key in base.items() if name not in own}
