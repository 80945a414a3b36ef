"""Datasets from tar archives (shards) in the layout of WebDataset, read at random by an index."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.storage.paths import exists, join

from .array_file import SharedArrays, Strings
from .class_names import index_classes, normalize_class_name, suggest_class, unify_class_names
from .decoders import Decoder
from .inputs import record_input
from .listing import keep_listing
from .lists import check_root, read_classes
from .sampling import Sampling
from .shard_index import chosen_shards, expand_pattern, read_index, sample_path
from .tables import read_json_object
from .timed import Action, TimedDataset
from .video import VideoDataset, VideoEntry

SETTINGS_FILE = "dataset.json"  # of archives that `prepare pack` has written: the sampling of the dataset
LABEL_FIELDS = ("label", "cls", "class")  # fields of a sample's JSON that may name its label


class LabelledSample(NamedTuple):
    """A sample with its label: a number, a class name, or several numbers."""

    path: str
    label: int | str | tuple[int, ...]
    span: tuple[float, float]
    actions: tuple[Action, ...] | None


@keep_listing
def shards(
    root: str,
    shards: str,
    num_classes: int | None = None,
    classes_file: str = "classes.txt",
    label_field: str | None = None,
    flip: bool | None = None,
    decoder: Decoder | None = None,
) -> VideoDataset:
    """Build a dataset from the archives `root/shards`, whose samples are `KEY.mp4` and `KEY.json`, `.cls` or `.txt`.

    Samples and archives that are broken are left out and named in the notes.

    Args:
        shards: Names of the archives, with `*` or `{000..119}`.
        num_classes: Default: the number of class names, or the highest label plus one.
        classes_file: A file with one class name a line. It may be missing.
        label_field: Field of the JSON that holds the label, a number, a class name or a list of numbers; None: the
            first of `LABEL_FIELDS`.
        flip: Mirror training clips left to right; None: as the dataset that was packed, else true.

    Raises:
        UserError: No sample can be used, or a file cannot be read.
    """
    check_root(root)
    folder, pattern = join(root, os.path.dirname(shards)), os.path.basename(shards)
    folder = folder if os.path.dirname(shards) else root
    index = read_index(folder, expand_pattern(pattern))
    numbers = chosen_shards(index, pattern)
    if not numbers:
        raise UserError(f"{folder}: no archives {pattern}; it has {shorten(index.header['shards'])}")
    samples, bad = _read_labels(index, numbers, os.path.dirname(shards), label_field)
    names = read_classes(join(root, classes_file))
    samples, names, more = _number_classes(samples, names, num_classes, classes_file)
    bad += more
    chosen = [index.header["shards"][number] for number in numbers]
    notes = [
        f"{name}: {shorten(index.header['problems'][name])}" for name in chosen if name in index.header["problems"]
    ]
    notes += [f"{shards}: samples left out: {shorten(bad)}"] if bad else []
    if not samples:
        raise UserError(f"{folder}: no sample of {pattern} can be used: {shorten([*bad, *notes], 3)}")
    return _build(root, samples, names, decoder, _sampling(folder, flip), notes)


def _build(
    root: str,
    samples: Sequence[LabelledSample],
    names: Sequence[str],
    decoder: Decoder | None,
    sampling: Sampling,
    notes: Sequence[str],
) -> VideoDataset:
    if any(sample.actions is not None for sample in samples):
        actions = [sample.actions or () for sample in samples]
        return TimedDataset(root, [sample.path for sample in samples], actions, names, decoder, sampling, notes=notes)
    entries = [VideoEntry(sample.path, sample.label, sample.span) for sample in samples]  # type: ignore[arg-type]
    return VideoDataset(root, entries, names, decoder, sampling, notes)


def _sampling(folder: str, flip: bool | None) -> Sampling:
    file = join(folder, SETTINGS_FILE)
    record_input(file)
    settings = read_json_object(file).get("sampling", {}) if exists(file) else {}
    return Sampling(**{**settings, **({} if flip is None else {"flip": flip})})


def _read_labels(
    index: SharedArrays, numbers: Sequence[int], folder: str, label_field: str | None
) -> tuple[list[LabelledSample], list[str]]:
    """Return the samples of archives with their labels, and why others are left out."""
    texts = Strings(index["labels"], index["label_bounds"])
    samples, bad = [], []
    for row in np.flatnonzero(np.isin(index["shards"], numbers)).tolist():
        path = os.path.join(folder, sample_path(index, row))
        try:
            samples.append(_sample(path, json.loads(texts[row]), label_field))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            bad.append(f"{path}: {error.args[0] if error.args else error}")
    return samples, bad


def _sample(path: str, fields: dict[str, Any], label_field: str | None) -> LabelledSample:
    """Convert the JSON of a sample; raises ValueError, KeyError, TypeError or OverflowError for wrong values."""
    keys = LABEL_FIELDS if label_field is None else (label_field,)
    label = next((fields[key] for key in keys if key in fields), None)
    start, end = fields.get("start"), fields.get("end")
    span = (float(0 if start is None else start), float(math.inf if end is None else end))
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"expected 0 <= start < end, found {span[0]:g} and {span[1]:g}")
    actions = None
    if "actions" in fields:
        actions = tuple(Action(int(number), float(first), float(last)) for number, first, last in fields["actions"])
    if isinstance(label, list):
        return LabelledSample(path, tuple(_number(item) for item in label), span, actions)
    if isinstance(label, str) and not label.strip().isdecimal():
        if not label.strip():
            raise ValueError("its label is empty")
        return LabelledSample(path, label, span, actions)
    return LabelledSample(path, _number(label), span, actions)


def _number(label: Any) -> int:
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip().isdecimal():
        raise ValueError(f"its label is {label!r}, expected a number or a name")
    return int(label)


def _number_classes(
    samples: Sequence[LabelledSample], names: list[str], num_classes: int | None, classes_file: str
) -> tuple[list[LabelledSample], list[str], list[str]]:
    """Return the samples with numbers as labels, the class names, and why samples are left out.

    If most labels are names, they are those of `classes_file`, or of all samples in alphabetical order.
    """
    texts = [sample for sample in samples if isinstance(sample.label, str)]
    numbered = 2 * len(texts) <= len(samples)
    written = {sample.label: normalize_class_name(str(sample.label)) for sample in texts}
    if not numbered and not names:
        origins = {str(sample.label): sample.path for sample in reversed(texts)}
        classes, _ = unify_class_names(origins)
        written = {sample.label: classes[str(sample.label)] for sample in texts}
        names = sorted(set(classes.values()))
    labels = index_classes(names, classes_file) if names else {}
    if not names:
        highest = max((number for sample in samples for number in _labels(sample)), default=-1)
        names = [str(number) for number in range(num_classes or highest + 1)]
    if num_classes is not None and len(names) != num_classes:
        raise UserError(f"{classes_file}: {len(names)} names for {num_classes} classes; see dataset.num_classes")
    good, bad = [], []
    for sample in samples:
        label = sample.label
        if isinstance(label, str):
            name = written[label]
            if name not in labels:
                bad.append(f"{sample.path}: {name!r} is not in {classes_file}{suggest_class(name, names)}")
                continue
            sample = sample._replace(label=labels[name])
        elif not numbered and not isinstance(label, tuple):
            if str(label) not in labels:
                bad.append(f"{sample.path}: its label is the number {label}, those of others are names")
                continue
            sample = sample._replace(label=labels[str(label)])  # a name of digits
        if any(number >= len(names) for number in _labels(sample)):
            bad.append(f"{sample.path}: label {label} is not in 0 to {len(names) - 1}")
            continue
        good.append(sample)
    return good, names, bad


def _labels(sample: LabelledSample) -> tuple[int, ...]:
    own = sample.label if isinstance(sample.label, tuple) else (sample.label,) if isinstance(sample.label, int) else ()
    return (*own, *(action.label for action in sample.actions or ()))
