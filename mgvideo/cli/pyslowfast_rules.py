"""Rules that translate keys of PySlowFast: the parts of the table in `pyslowfast_keys`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]  # the values of a PySlowFast config, by dotted key, with PySlowFast's defaults


@dataclass(frozen=True)
class Translation:
    """What a key of a config becomes.

    Attributes:
        overrides: Our keys and groups with their values; empty if ours does the same anyway.
        reason: Why the key is not translated, or what differs; empty if nothing does.
        blocks: Whether no command does the same, so that none is printed.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    blocks: bool = False


@dataclass(frozen=True)
class Rule:
    """How a key of PySlowFast is translated.

    Attributes:
        text: What the key is here, for the page.
        translate: Returns the translation of a value, given all settings.
        default: PySlowFast's default; None if only a value in the file counts.
    """

    text: str
    translate: Callable[[Any, Settings], Translation]
    default: Any = None


def copied(key: str, default: Any = None, text: str = "") -> Rule:
    """Return the rule of a key that has the same meaning here under the name `key`."""
    return Rule(f"`{key}`{text}", lambda value, _: Translation({key: value}), default)


def computed(
    text: str, function: Callable[[Any, Settings], Mapping[str, Any] | Translation], default: Any = None
) -> Rule:
    """Return the rule of a key from which `function` computes overrides, or a whole translation."""

    def translate(value: Any, settings: Settings) -> Translation:
        result = function(value, settings)
        return result if isinstance(result, Translation) else Translation(result)

    return Rule(text, translate, default)


def no_effect(because: str) -> Rule:
    """Return the rule of a key that changes nothing here."""
    reason = f"has no effect here, because {because}"
    return Rule(reason, lambda *_: Translation(reason=reason))


def absent(because: str, *, off: Any = None, blocks: bool = False, default: Any = None, shown: str = "") -> Rule:
    """Return the rule of a feature that does not exist here. `off` is the value that switches it off.

    `shown` is that value on the page.
    """
    reason = f"not there, because {because}"

    def translate(value: Any, _: Settings) -> Translation:
        is_off = off is not None and equal(value, off)
        return Translation() if is_off else Translation(reason=reason, blocks=blocks)

    only = f"only {shown or f'`{off}`'}: another value is {reason}"
    return Rule(reason if off is None else only, translate, default)


def part_of(text: str, default: Any = None) -> Rule:
    """Return the rule of a key that is translated together with another one."""
    return Rule(text, lambda *_: Translation(), default)


def equal(first: Any, second: Any) -> bool:
    """Return whether two config values are equal; numbers may differ by rounding."""
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    numbers = (int, float)
    if isinstance(first, numbers) and isinstance(second, numbers) and not isinstance(first, bool):
        return abs(first - second) <= 1e-6 * max(abs(first), abs(second))
    return bool(first == second)
