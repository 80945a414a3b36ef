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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mgvideo import __version__
from mgvideo.storage.paths import is_remote, strip_file_scheme
from mgvideo.storage.remote_cache import cache_folder

from .array_file import SharedArrays
from .inputs import are_unchanged, is_recording, own_change, record_inputs
from .scan import LISTINGS
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
        if is_recording():  # one builder called by another, which keeps the listing
            return build(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        decoder = arguments.pop("decoder")
        kind = inspect.get_annotations(build, eval_str=True)["return"]
        files = _places(arguments["root"], f"{FORMAT} {__version__} {build.__qualname__} {arguments}")
        for file in files:
            arrays = _load(file)
            if arrays is not None:
                dataset: VideoDataset = kind.from_arrays(arrays, decoder)
                return dataset
        with record_inputs() as inputs:
            dataset = build(*args, **kwargs)
        if len(dataset) < MIN_VIDEOS:
            return dataset
        dataset.arrays.header.update(fingerprint=dataset.fingerprint())
        for file in files:
            with suppress(OSError):
                _write(file, dataset, inputs)
                arrays = SharedArrays.open(str(file), verify=False)
                loaded: VideoDataset = kind.from_arrays(arrays, decoder)
                return loaded
        return dataset

    return build_or_load  # type: ignore[return-value]


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


def _write(file: Path, dataset: VideoDataset, inputs: dict[str, Any]) -> None:
    """Write the listing of a dataset. Raises OSError."""
    folder = str(file.parent.parent)
    if file.parent.name == LISTINGS and not file.parent.exists():
        with own_change(folder, inputs):  # it changes the time of the dataset's folder
            file.parent.mkdir()
    dataset.arrays.header.update(inputs=inputs)
    dataset.arrays.write(file)
