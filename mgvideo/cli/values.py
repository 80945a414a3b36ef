"""The values of overrides: a text, such as a path, is taken as it is typed, whatever Hydra's grammar makes of it.

In that grammar `=`, `#`, `~`, brackets, quotes and letters outside of ASCII need quotes, and a comma makes a sweep. The
values of keys that hold a text get these quotes here. Still read by Hydra: `'…'` and `"…"` around a whole value, a
backslash before a special character, `${…}`, `null`, and with --multirun the comma.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgvideo.errors import UserError

from .groups import holds_text
from .schema import RunKeys

_KEY = re.compile(r"(?:\+\+|\+|~)?([A-Za-z_][\w.$-]*)")


def quote(text: str | Path) -> str:
    """A text as a quoted value of Hydra's grammar, whatever is in it."""
    text = str(text)
    mark = '"' if "'" in text and '"' not in text else "'"
    # a backslash is itself, but for those before a mark
    body = re.sub(rf"(\\*){mark}", lambda found: f"{found[1]}{found[1]}\\{mark}", text)
    ending = body[len(body.rstrip("\\")) :]
    return f"{mark}{body}{ending}{mark}"


def expand_home(text: str) -> str:
    """Expand a leading `~`, which a shell leaves alone after `key=`."""
    return os.path.expanduser(text) if text.startswith("~") else text


@cache
def run_keys() -> dict[str, str]:
    """The keys of a run outside the groups, dotted, with their declared types."""
    types: dict[str, str] = {}
    for entry in fields(RunKeys):
        block = entry.default_factory() if callable(entry.default_factory) else None
        if is_dataclass(block):
            types |= {f"{entry.name}.{inner.name}": str(inner.type) for inner in fields(block)}
        else:
            types[entry.name] = str(entry.type)
    return types


def declares_text(declared: str) -> bool:
    """Return whether a declared type, as it is written, is that of a text."""
    return declared.removesuffix(" | None") == "str"


def quote_texts(
    overrides: Sequence[str], compose: Callable[[Sequence[str]], DictConfig], multirun: bool = False
) -> list[str]:
    """Quote the values of keys that hold a text, where Hydra would read them as something else, or not at all.

    `compose` makes the config that tells which keys these are; it is called only where a value needs it, with the
    overrides that Hydra reads as they are.
    """
    needed = {word for word in overrides if _needs_quotes(word, multirun)}
    if not needed:
        return list(overrides)
    plain = [word for word in overrides if word not in needed]
    try:
        cfg = compose(plain)
    except Exception:  # reported when all of them are composed
        cfg = compose([])
    return [_quoted(word, cfg, multirun) if word in needed else word for word in overrides]


def _needs_quotes(word: str, multirun: bool) -> bool:
    """Return whether a text of this value could arrive otherwise than typed."""
    key, is_set, text = word.partition("=")
    if not (is_set and text and _KEY.fullmatch(key)):
        return False
    declared = run_keys().get(_name(key))
    if declared is not None and not declares_text(declared):
        return False
    override = _parsed(word)
    if override is None:
        return True
    if override.is_sweep_override():
        return not multirun
    value = override.value()
    if isinstance(value, QuotedString) or value is None:
        return False
    if isinstance(value, str):
        return value == text.strip() != text or _has_curly_quotes(text)
    return True  # a number, a truth value, a list: the key may hold a text all the same, such as the folder 2024


def _has_curly_quotes(text: str) -> bool:
    """Return whether a word processor or a web page has made curly ones of the quotes around a value."""
    return len(text) > 2 and text[0] + text[-1] in ("“”", "‘’")


def _quoted(word: str, cfg: DictConfig, multirun: bool) -> str:
    key, _, text = word.partition("=")
    is_readable, is_text = _parsed(word) is not None, holds_text(cfg, _name(key))
    if is_text is False or (is_text is None and is_readable):
        return word
    if _has_curly_quotes(text):
        text = text[1:-1]
    parts = text.split(",") if multirun and not is_readable else [text]
    return f"{key}={','.join(quote(expand_home(part)) for part in parts)}"


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _name(key: str) -> str:
    return key.lstrip("+~")


def read_dotlist(overrides: Sequence[str], is_text: Callable[[str], bool | None]) -> DictConfig:
    """A config of `key=value`, for keys that Hydra does not read: texts as typed, other values as YAML.

    Raises:
        UserError: a value that is neither.
    """
    cfg = OmegaConf.create()
    for word in overrides:
        key, _, text = word.partition("=")
        if is_text(key) and text != "null":
            OmegaConf.update(cfg, key, expand_home(_unquoted(text)))
            continue
        try:
            cfg.merge_with_dotlist([word])
        except yaml.YAMLError as error:
            raise UserError(f"cannot read '{word}': {text} is neither a number nor a word nor a list") from error
    return cfg


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1].replace(f"\\{text[0]}", text[0]) if is_quoted else text
