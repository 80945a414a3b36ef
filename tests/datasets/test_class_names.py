"""Test class names: one spelling for each name, an error for names that look alike."""

from __future__ import annotations

import pytest

from mgvideo.datasets.class_names import index_classes, normalize_class_name, suggest_class, unify_class_names
from mgvideo.errors import UserError


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("jump", "jump"),
        ("jump ", "jump"),
        ("\tjump  high\u00a0", "jump high"),
        ("jump\u00a0high", "jump high"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u1112\u1161\u11ab", "\ud55c"),  # decomposed Hangul, as macOS writes it
        ("\ufeffju\u200bmp\u00ad", "jump"),
        ("\u202ejump\u202c", "jump"),
        ("\u3000跳ぶ\u3000", "跳ぶ"),
        ("می\u200cخواهم\u200c", "می\u200cخواهم"),  # the joiner inside a Persian word is part of its spelling
        ("caf\udce9", "caf\\xe9"),
        ("bell\x07", "bell"),
        ('"jump"', "jump"),  # quoted, as some names in Kinetics' list of classes
        ("“jump”", "jump"),
        ("'jump' and 'run'", "'jump' and 'run'"),
        ("shooting, basketball", "shooting, basketball"),
    ],
)
def test_variants_of_a_name_have_one_spelling(written: str, name: str) -> None:
    assert normalize_class_name(written) == name
    assert normalize_class_name(name) == name


def test_variants_of_a_name_are_one_class_with_a_note() -> None:
    places = {"cafe\u0301": "train.csv:2", "jump": "train.csv:3", "caf\u00e9": "val.csv:5", "jump ": "val.csv:9"}
    classes, notes = unify_class_names(places)
    assert classes == {"cafe\u0301": "caf\u00e9", "caf\u00e9": "caf\u00e9", "jump": "jump", "jump ": "jump"}
    assert notes == [
        "read as one class: 'cafe\\u0301' (train.csv:2), 'caf\\xe9' (val.csv:5)",
        "read as one class: 'jump' (train.csv:3), 'jump ' (val.csv:9)",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("jump", "Jump"),
        ("JUMP", "jump"),
        ("push_up", "push up"),
        ("push-up", "push up"),
        ("jump.", "jump"),
        ("jump", "ｊｕｍｐ"),
        ("don't", "don’t"),
        ("find", "ﬁnd"),
        ("Straße", "strasse"),
        ("car", "саr"),  # Cyrillic
        ("3", "03"),
        ("ab\u200cc", "abc"),
    ],
)
def test_look_alike_names_error_names_both_origins(one: str, other: str) -> None:
    with pytest.raises(UserError, match=r"^b\.csv:7: class .* looks like .* of a\.csv:2: use one name for one class"):
        unify_class_names({one: "a.csv:2", "other": "a.csv:3", other: "b.csv:7"})
    with pytest.raises(UserError, match=r"classes\.txt: classes 0 and 2, .* look alike"):
        index_classes([one, "other", other], "classes.txt")


def test_error_shows_letters_of_other_alphabets_as_codes() -> None:
    with pytest.raises(UserError, match=r"class '\\u0441ar' looks like 'car'"):
        unify_class_names({"car": "a", "\u0441ar": "b"})


@pytest.mark.parametrize(
    "names", [["-1", "1"], ["a", "b"], ["pêche", "péché"], ["up", "u p"], ["1.0", "10"], ["a1", "a01"]]
)
def test_different_names_stay_different_classes(names: list[str]) -> None:
    assert sorted(set(unify_class_names(dict.fromkeys(names, "a"))[0].values())) == sorted(names)
    assert index_classes(names, "a") == {name: label for label, name in enumerate(names)}


def test_empty_and_joined_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"a\.csv:4: the class name '\\u200b ' is empty"):
        unify_class_names({"\u200b ": "a.csv:4"})
    places = {"jump": "a.csv:2", "walk": "a.csv:3", "jump; walk": "a.csv:4", "shooting, basketball": "a.csv:5"}
    with pytest.raises(UserError, match=r"a\.csv:4: 'jump; walk' joins several classes"):
        unify_class_names(places)
    del places["jump; walk"]
    assert unify_class_names(places)[0]["shooting, basketball"] == "shooting, basketball"


def test_unknown_name_error_suggests_a_look_alike() -> None:
    assert suggest_class("Playing_Harp", ["abseiling", "playing harp"]) == "; 'playing harp' looks like it"
    assert suggest_class("flying", ["abseiling"]) == ""
