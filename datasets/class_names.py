"""Normalise class names: one spelling for each class, and an error if two classes look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten

from .tables import strip_quotes

# soft hyphen, zero-width space, marks of writing direction, word joiner, byte order mark, control characters
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)
_JOINERS = (
    "\u200c\u200d"  # zero-width (non-)joiners: part of the spelling inside Persian and Hindi words, so only stripped
)
# Cyrillic and Greek look-alikes, quotes and dashes.
_LATIN = str.maketrans("асеһіјорԛѕԝхуο‘’ʼ`´“”‐‑‒–—−", "acehijopqswxyo'''''\"\"------")


def normalize_class_name(text: str) -> str:
    """Return the normal spelling of a class name.

    Composes accents (NFC; macOS writes NFD), collapses white space, removes invisible characters and enclosing quotes,
    which web pages and spreadsheets add, and writes bytes that are not UTF-8 as `\\xe9`.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = " ".join(strip_quotes(_INVISIBLE.sub("", text).strip(_JOINERS)).split())
    return re.sub("[\ud800-\udfff]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    """Write a surrogate as `\\xe9` if it stands for a byte (surrogateescape), else as `\\ud800`."""
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"


def look_alike_key(name: str) -> str:
    """Return a key that is equal for names that look alike.

    It ignores case, spaces, `_`, `-`, character width, quotes, look-alike alphabets, final dots and leading zeros of
    numbers.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).translate(_LATIN)
    text = "".join(char for char in text if unicodedata.category(char) != "Cf" and char not in "\ufe0e\ufe0f")
    text = re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text).strip(" .")
    return text.lstrip("0") or "0" if text.isdecimal() else text


def unify_class_names(origins: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Map class names as they are written to normalised class names.

    Args:
        origins: Written name → where it is first written (`train.csv:3`, a folder), for errors.

    Returns:
        Written name → class, and notes on classes that are written in several ways.

    Raises:
        UserError: A name is empty, two classes look alike, or a name joins several class names.
    """
    classes = {written: normalize_class_name(written) for written in origins}
    spellings: dict[str, list[str]] = {}
    first_by_key: dict[str, str] = {}  # look_alike_key → first written name
    for written, name in classes.items():
        if not name:
            raise UserError(f"{origins[written]}: the class name {written!a} is empty")
        spellings.setdefault(name, []).append(written)
        first = first_by_key.setdefault(look_alike_key(name), written)
        if classes[first] != name:
            raise UserError(
                f"{origins[written]}: class {_shown(name)} looks like {_shown(classes[first])} of {origins[first]}: "
                "use one name for one class, and for two classes names that are easy to tell apart"
            )
    for written, name in classes.items():
        parts = [normalize_class_name(part) for part in re.split("[;,|]", name)]
        if len(parts) > 1 and spellings.keys() >= set(parts):
            raise UserError(f"{origins[written]}: {name!r} joins several classes, {parts}: a video has one label here")
    merged = [[f"{w!a} ({origins[w]})" for w in group] for group in spellings.values() if len(group) > 1]
    return classes, [f"read as one class: {shorten(group)}" for group in merged]


def _shown(name: str) -> str:
    """Quote a name; if it has characters that look like Latin ones, write all non-ASCII characters as codes."""
    return repr(name) if name.translate(_LATIN) == name else ascii(name)


def suggest_class(name: str, names: Iterable[str]) -> str:
    """Return `; 'jump' looks like it` if a known name looks like the unknown `name`, else an empty string."""
    key = look_alike_key(name)
    return next((f"; {other!r} looks like it" for other in names if look_alike_key(other) == key), "")


def index_classes(names: Sequence[str], file: str) -> dict[str, int]:
    """Return name → label for the class names of a file; raises UserError if two names look alike."""
    label_by_key: dict[str, int] = {}
    for label, name in enumerate(names):
        other = label_by_key.setdefault(look_alike_key(name), label)
        if other != label:
            raise UserError(
                f"{file}: classes {other} and {label}, {_shown(names[other])} and {_shown(name)}, look alike"
            )
    return {name: label for label, name in enumerate(names)}
