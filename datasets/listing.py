"""Keep the listing of a dataset: what its lists and folders say, in one file that later runs and other ranks map.

The listing is kept in `.mgvideo/` of the dataset's folder, beside its lists; if that is read-only or at a URL, in the
cache of this user. It names the lists and folders that it was made from with their sizes and times of change, so that
it is made anew after any change. A listing that is damaged or cannot be written costs only time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mgvideo import __version__
from mgvideo.storage.paths import is_remote, strip_file_scheme
from mgvideo.storage.remote_cache import cache_folder

from .array_file import SharedArrays
from .inputs import are_unchanged, is_recording, own_change, record_input, record_inputs
from .scan import LISTINGS
from .timed import TimedDataset
from .video import VideoDataset

FORMAT = 1  # version of the listings
MIN_VIDEOS = 1000  # smaller datasets are listed in a moment, so no file is kept

_logger = logging.getLogger(__name__)
Build = TypeVar("Build", bound=Callable[..., VideoDataset])


def keep_listing(build: Build) -> Build:
    """Decorate a function of `root`, `decoder` and other arguments that builds a dataset, to keep the listing."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_or_load(*args: Any, **kwargs: Any) -> VideoDataset:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        decoder = arguments.pop("decoder")

        def list_videos() -> SharedArrays:
            dataset = build(*args, **kwargs)
            dataset.arrays.header.update(videos=len(dataset))
            if len(dataset) >= MIN_VIDEOS:
                dataset.arrays.header.update(fingerprint=dataset.fingerprint())
            return dataset.arrays

        if is_recording():  # one builder called by another, which keeps the listing
            return build(*args, **kwargs)
        arrays = kept_arrays(arguments["root"], f"{build.__qualname__} {arguments}", list_videos)
        kind = TimedDataset if "actions" in arrays else VideoDataset
        return kind.from_arrays(arrays, decoder)

    return build_or_load  # type: ignore[return-value]


def kept_arrays(root: str, description: str, build: Callable[[], SharedArrays]) -> SharedArrays:
    """Return `build()`, or its arrays from an earlier call for the same root and description and unchanged inputs.

    `header["videos"]` is the number of videos; arrays of fewer than `MIN_VIDEOS` are not kept.
    """
    files = _places(root, f"{FORMAT} {__version__} {description}")
    arrays = next((arrays for file in files if (arrays := _load(file)) is not None), None)
    if arrays is None:
        with record_inputs() as inputs:
            arrays = build()
        arrays.header.update(inputs=inputs)
        if arrays.header["videos"] >= MIN_VIDEOS:
            arrays = _write_first(files, arrays, inputs)
    for path, state in arrays.header["inputs"].items():
        record_input(path, state)  # of a caller
    return arrays


def _write_first(files: Sequence[Path], arrays: SharedArrays, inputs: dict[str, Any]) -> SharedArrays:
    """Write arrays to the first file that can be written and map it; if there is none, return them as they are."""
    for file in files:
        with suppress(OSError):
            _write(file, arrays, inputs)
            return SharedArrays.open(str(file), verify=False)
    return arrays


def _places(root: str, arguments: str) -> list[Path]:
    """Return the files that may hold the listing, the first choice first."""
    root = root if is_remote(root) else os.path.abspath(strip_file_scheme(root))
    name = hashlib.sha256(f"{root}\n{arguments}".encode("utf-8", "surrogateescape")).hexdigest()[:24] + ".listing"
    beside = [] if is_remote(root) else [Path(root) / LISTINGS / name]
    return [*beside, cache_folder() / "listings" / name]


def _load(file: Path) -> SharedArrays | None:
    """Return the arrays of a listing, or None if it is missing, damaged or out of date."""
    try:
        arrays = SharedArrays.open(str(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _logger.warning("%s: %s; it is made anew", file, getattr(error, "strerror", None) or error)
        return None
    return arrays if are_unchanged(arrays.header["inputs"]) else None


def _write(file: Path, arrays: SharedArrays, inputs: dict[str, Any]) -> None:
    """Write a listing. Raises OSError."""
    if file.parent.name == LISTINGS and not file.parent.exists():
        with own_change(str(file.parent.parent), inputs):  # it changes the time of the dataset's folder
            file.parent.mkdir()
    arrays.header.update(inputs=inputs)
    arrays.write(file)
