"""Read and quote overrides, so that Hydra reads a string such as a path exactly as typed; flatten nested configs.

In Hydra's grammar `=`, `#`, `~`, brackets, quotes and non-ASCII letters need quotes, and a comma makes a sweep. This
module adds the quotes for keys that hold a string. Hydra still interprets `'…'` and `"…"` around a whole value, a
backslash before a special character, `${…}`, `null`, and with --multirun the comma.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
    """Return any text as a quoted value in Hydra's grammar."""
    text = str(text)
    mark = '"' if "'" in text and '"' not in text else "'"
    # Backslashes are literal, except before a quotation mark.
    body = re.sub(rf"(\\*){mark}", lambda match: f"{match[1]}{match[1]}\\{mark}", text)
    ending = body[len(body.rstrip("\\")) :]
    return f"{mark}{body}{ending}{mark}"


def override_key(override: str) -> str:
    """Return the key that an override sets, without a leading `+` or `~`."""
    return override.partition("=")[0].lstrip("+~")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by their dotted keys. Empty dictionaries leave no key."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def expand_home(text: str) -> str:
    """Expand a leading `~`, which the shell does not expand after `key=`."""
    return os.path.expanduser(text) if text.startswith("~") else text


@cache
def run_keys() -> dict[str, str]:
    """Return the dotted keys of a run outside the groups, with their declared types."""
    types: dict[str, str] = {}
    for entry in fields(RunKeys):
        block = entry.default_factory() if callable(entry.default_factory) else None
        if is_dataclass(block):
            types |= {f"{entry.name}.{inner.name}": str(inner.type) for inner in fields(block)}
        else:
            types[entry.name] = str(entry.type)
    return types


def declares_text(declared: str) -> bool:
    """Return whether a declared type, as written in the source, is `str` or `str | None`."""
    return declared.removesuffix(" | None") == "str"


def quote_texts(
    overrides: Sequence[str], compose: Callable[[Sequence[str]], DictConfig], multirun: bool = False
) -> list[str]:
    """Quote the values of keys that hold a string, if Hydra would misread them or fail to parse them.

    `compose` returns the config from which the types of keys are read. It is called only if some value may need
    quotes, with the overrides that need none.
    """
    candidates = {override for override in overrides if _may_need_quotes(override, multirun)}
    if not candidates:
        return list(overrides)
    readable = [override for override in overrides if override not in candidates]
    try:
        cfg = compose(readable)
    except Exception:  # composing all overrides raises and reports it again
        cfg = compose([])
    return [_quote_override(word, cfg, multirun) if word in candidates else word for word in overrides]


def _may_need_quotes(word: str, multirun: bool) -> bool:
    """Return whether Hydra would change the value of this override, or fail to parse it, if its key holds a string."""
    key, is_set, text = word.partition("=")
    if not (is_set and text and _KEY.fullmatch(key)):
        return False
    declared = run_keys().get(override_key(word))
    if declared is not None and not declares_text(declared):
        return False
    override = _parse(word)
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


def _quote_override(word: str, cfg: DictConfig, multirun: bool) -> str:
    """Return the override with a quoted value if its key holds a string, or if Hydra cannot parse it otherwise."""
    key, _, text = word.partition("=")
    is_readable, is_text = _parse(word) is not None, holds_text(cfg, override_key(word))
    if is_text is False or (is_text is None and is_readable):
        return word
    if _has_curly_quotes(text):
        text = text[1:-1]
    parts = text.split(",") if multirun and not is_readable else [text]
    return f"{key}={','.join(quote(expand_home(part)) for part in parts)}"


def _parse(word: str) -> Override | None:
    """Return the override as Hydra parses it, or None if Hydra cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def read_dotlist(overrides: Sequence[str], is_text: Callable[[str], bool | None]) -> DictConfig:
    """Return a config of `key=value` words without Hydra: strings as typed, other values parsed as YAML.

    Raises:
        UserError: A value is not valid YAML.
    """
    cfg = OmegaConf.create()
    for word in overrides:
        key, _, text = word.partition("=")
        if is_text(key) and text != "null":
            OmegaConf.update(cfg, key, expand_home(_strip_quotes(text)))
            continue
        try:
            cfg.merge_with_dotlist([word])
        except yaml.YAMLError as error:
            raise UserError(f"cannot read '{word}': {text} is not a number, a word or a list") from error
    return cfg


def _strip_quotes(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1].replace(f"\\{text[0]}", text[0]) if is_quoted else text
