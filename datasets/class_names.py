"""Names of classes as people and programs write them: one spelling for each, an error where two classes look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from mgvideo.errors import UserError

from .scan import shorten
from .tables import strip_quotes

# soft hyphen, zero-width space, marks of writing direction, word joiner, byte order mark, control characters
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)
_JOINERS = "\u200c\u200d"  # part of the spelling inside a Persian or Hindi word, invisible at its ends
_LATIN = str.maketrans("асеһіјорԛѕԝхуο‘’ʼ`´“”‐‑‒–—−", "acehijopqswxyo'''''\"\"------")  # Cyrillic, Greek; marks


def normalize_class_name(text: str) -> str:
    """Give all variants of a class name one spelling: NFC, single spaces, nothing invisible, other bytes as `\\xe9`.

    macOS writes letters with accents as two characters (NFD), web pages and spreadsheets add non-breaking spaces,
    zero-width characters and quotes around the whole name.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = " ".join(strip_quotes(_INVISIBLE.sub("", text).strip(_JOINERS)).split())
    return re.sub("[\ud800-\udfff]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"


def look_alike_key(name: str) -> str:
    """A key that is equal for names that differ in case, spaces, `_`, `-`, width, quotes, alphabet or a last dot."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).translate(_LATIN)
    text = "".join(char for char in text if unicodedata.category(char) != "Cf" and char not in "\ufe0e\ufe0f")
    text = re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text).strip(" .")
    return text.lstrip("0") or "0" if text.isdecimal() else text


def unify_class_names(places: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Map class names as they are written to the names of the classes.

    Args:
        places: where each name is first written (`train.csv:3`, a folder), by the name as it is written there.

    Returns:
        The class of each written name, and notes on names that were written in several ways.

    Raises:
        UserError: a name is empty, two classes look alike, or a name joins names of classes.
    """
    classes = {written: normalize_class_name(written) for written in places}
    spellings: dict[str, list[str]] = {}
    looks: dict[str, str] = {}  # by look_alike_key: the first name as it is written
    for written, name in classes.items():
        if not name:
            raise UserError(f"{places[written]}: the class name {written!a} is empty")
        spellings.setdefault(name, []).append(written)
        first = looks.setdefault(look_alike_key(name), written)
        if classes[first] != name:
            raise UserError(
                f"{places[written]}: class {_shown(name)} looks like {_shown(classes[first])} of {places[first]}: "
                "use one name for one class, and for two classes names that are easy to tell apart"
            )
    for written, name in classes.items():
        parts = [normalize_class_name(part) for part in re.split("[;,|]", name)]
        if len(parts) > 1 and spellings.keys() >= set(parts):
            raise UserError(f"{places[written]}: {name!r} is several classes, {parts}: a video has one label here")
    merged = [[f"{w!a} ({places[w]})" for w in group] for group in spellings.values() if len(group) > 1]
    return classes, [f"read as one class: {shorten(group)}" for group in merged]


def _shown(name: str) -> str:
    """A name in quotes; letters of other alphabets that look like Latin ones, and what is invisible, by their codes."""
    return repr(name) if name.translate(_LATIN) == name else ascii(name)


def suggest_class(name: str, names: Iterable[str]) -> str:
    """`; 'jump' looks like it` for an unknown name where a known one does, or nothing."""
    key = look_alike_key(name)
    return next((f"; {other!r} looks like it" for other in names if look_alike_key(other) == key), "")


def index_classes(names: Sequence[str], file: str) -> dict[str, int]:
    """Labels by name of the classes that a file lists in their order; raises UserError where names look alike."""
    looks: dict[str, int] = {}
    for label, name in enumerate(names):
        other = looks.setdefault(look_alike_key(name), label)
        if other != label:
            raise UserError(
                f"{file}: classes {other} and {label}, {_shown(names[other])} and {_shown(name)}, look alike"
            )
    return {name: label for label, name in enumerate(names)}
