"""Read weights files of many formats without running any code that they contain.

Formats: `torch.save` (also from before torch 1.6), pickle, safetensors and `.npz`, each of them also inside gzip,
bzip2, xz, tar or zip.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import numpy as np
import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.storage.paths import is_remote, local_copy

SUFFIXES = (".pth", ".pt", ".pyth", ".ckpt", ".bin", ".safetensors", ".pkl", ".npz", ".pth.tar")
DECOMPRESSORS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
UNSUPPORTED_FORMATS = {  # first bytes of a file → the error message
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it first",
    b"Rar!": "is a rar archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, as Keras writes: its tensors have different names and shapes",
}
INCOMPLETE_SAFETENSORS = (  # what errors of the safetensors library contain if a file is cut short, by its version
    *("header length", "header too small", "not fully covered"),
    *("InvalidHeaderLength", "HeaderTooSmall", "MetadataIncompleteBuffer"),
)
MAX_LISTED_NAMES = 8  # a message lists this many names and counts the rest
ITEMS = "items of it"  # the key of a placeholder's items; no attribute of an object has a space in its name


class UnreadableWeightsError(Exception):
    """The file has no readable weights. The message says what the file is and what to do; its subject is the file."""


class Placeholder:
    """Replaces an unpickled object whose class is not loaded. Keeps its attributes and items, but none of its code."""

    def __new__(cls, *_: Any, **attributes: Any) -> Placeholder:
        """Keep the keyword arguments as attributes. Drop positional arguments, because they have no names."""
        placeholder = object.__new__(cls)
        placeholder.__dict__.update(attributes)
        placeholder.__dict__[ITEMS] = {}
        return placeholder

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else [state]:
            if isinstance(part, Mapping):
                self.__dict__.update({str(name): value for name, value in part.items()})

    def __setitem__(self, name: Any, value: Any) -> None:
        self.__dict__[ITEMS][name] = value

    def append(self, value: Any) -> None:
        """Keep an item of a list or a set."""
        items = self.__dict__[ITEMS]
        items[len(items)] = value

    add = append

    def __call__(self, *_: Any, **__: Any) -> Placeholder:
        """Return an empty placeholder; no code runs."""
        return Placeholder()

    def as_dict(self) -> dict[Any, Any]:
        """Attributes and items by name. For an `nn.Module`: parameters, persistent buffers and submodules by name."""
        attributes = {name: value for name, value in self.__dict__.items() if name != ITEMS}
        if {"_modules", "_parameters", "_buffers"} <= attributes.keys():
            not_persistent = set(attributes.get("_non_persistent_buffers_set") or ())
            buffers = {
                name: value for name, value in dict(attributes["_buffers"]).items() if name not in not_persistent
            }
            return {**dict(attributes["_parameters"]), **buffers, **dict(attributes["_modules"])}
        return {**attributes, **self.__dict__[ITEMS]}


def _load_storage(data: bytes) -> Any:
    """Load a tensor's storage from a plain pickle. torch's own function for this would run code in the pickle."""
    return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


_RECONSTRUCT_ARRAY = np.empty(0).__reduce__()[0]
ALLOWED_GLOBALS: dict[str, Any] = {  # what a pickle may call, besides torch's own list for `weights_only=True`
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex, bytearray, bytes, slice, range)},
    **{f"builtins.{kind.__name__}": kind for kind in (object, list, dict, tuple, int, float, str, bool)},
    "collections.defaultdict": defaultdict,
    "torch.storage._load_from_bytes": _load_storage,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.{core}.multiarray._reconstruct": _RECONSTRUCT_ARRAY for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": np.float32(0).__reduce__()[0] for core in ("core", "_core")},
}
REFUSED_GLOBALS = {  # modules and builtins that a pickle names only in order to run code
    *("os", "posix", "nt", "sys", "subprocess", "shutil"),
    *("importlib", "runpy", "pty", "socket", "ctypes", "webbrowser"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.__import__", "builtins.getattr"),
    *("builtins.setattr", "builtins.delattr", "builtins.globals", "builtins.execfile", "builtins.apply"),
}


_PythonUnpickler: Any = pickle._Unpickler  # the C unpickler has no hook for the BUILD instruction


class Unpickler(_PythonUnpickler):
    """Reads a pickle of tensors, arrays and plain values. Every other object becomes a `Placeholder`.

    So no function or class that the pickle names is called, except those of `ALLOWED_GLOBALS` and torch's own list.
    Raises `UnreadableWeightsError` if the pickle names anything in `REFUSED_GLOBALS`.
    """

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._classes: dict[str, type[Placeholder]] = {}

    def load_build(self) -> None:
        """Set an object's state.

        Raises UnpicklingError for classes and functions: they are the process's own, and the change would last.
        """
        if not isinstance(self.stack[-2], Placeholder | Tensor | np.ndarray | np.dtype | OrderedDict):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function, else a `Placeholder` class with its name."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2 names
        full_name = f"{module}.{name}"
        allowed = ALLOWED_GLOBALS.get(full_name, _get_allowed_globals().get(full_name))
        if allowed is not None:
            return allowed
        # such as "Path.touch"; the last part of a nested class's name begins with a capital letter
        is_method = "." in name and not name.rpartition(".")[2][:1].isupper()
        if {full_name, module.partition(".")[0]} & REFUSED_GLOBALS or is_method:
            raise UnreadableWeightsError(
                f"contains code, {full_name}, which was not run: if you trust the file, load it with "
                "torch.load(…, weights_only=False) and save only its state dict with torch.save"
            )
        if full_name not in self._classes:
            self._classes[full_name] = type(name, (Placeholder,), {"__module__": module})
        return self._classes[full_name]


_PICKLE_MODULE = SimpleNamespace(
    __name__="pickle", Unpickler=Unpickler, load=lambda file, **kw: Unpickler(file, **kw).load()
)


def read_weights(path: str | PathLike[str]) -> Any:
    """Read a weights file.

    Args:
        path: a local path, a URL, or the name of torchvision weights such as `ResNet50_Weights.IMAGENET1K_V2`.

    Returns:
        The file's content. Tensors are on the CPU. Objects other than tensors, arrays and plain values are
        `Placeholder`s.

    Raises:
        UserError: the file does not exist, has no readable weights, or contains code. The message says what the file
            is and what to do.
    """
    copy_note = ""
    try:
        if re.fullmatch(r"\w+_Weights\.\w+", str(path)):
            return torchvision.models.get_weight(str(path)).get_state_dict(progress=False, check_hash=True)
        file = local_copy(path)
        copy_note = f"; its local copy is {file}" if is_remote(path) else ""
        if os.path.isdir(file):
            raise UnreadableWeightsError(_describe_folder(Path(file)))
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old formats
            return _read_content(opened)
    except UnreadableWeightsError as error:
        reason = str(error).replace("FILE", str(path))
        raise UserError(f"cannot read weights from {path}: it {reason}{copy_note}") from error
    except OSError as error:
        raise UserError(f"cannot read weights from {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make an unpickler raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read weights from {path}: it is damaged or not a weights file{copy_note}: {reason}"
        ) from error


def _read_content(file: IO[bytes], depth: int = 0) -> Any:
    """Read an open file; its first bytes decide the format. `depth` counts the archives and compressions around it."""
    start = file.read(512)
    file.seek(0)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not start.strip(b"\0"):
        raise UnreadableWeightsError("is empty" if not start else "contains only zeros: download it again")
    for magic, reason in UNSUPPORTED_FORMATS.items():
        if start.startswith(magic):
            raise UnreadableWeightsError(reason)
    for magic, opener in DECOMPRESSORS.items():
        if start.startswith(magic) and depth < 3:
            with opener(file) as inner:
                return _read_unpacked(inner, depth)
    if start.startswith(b"PK"):
        if zipfile.is_zipfile(file):
            return _read_zip(file, depth)
        raise UnreadableWeightsError(_cut_short(size))
    if _is_tar(file):
        return _read_tar(file, depth)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 100_000_000:
        return _read_safetensors(file, size)
    if not start.startswith(b"\x80"):
        _raise_if_text(start)
    return _read_pickle(file, size)


def _read_unpacked(inner: IO[bytes], depth: int) -> Any:
    """Unpack a compressed file or an archive member into memory and read it."""
    try:
        data = inner.read()
    except EOFError as error:
        raise UnreadableWeightsError("is cut short inside its compressed data: download it again") from error
    return _read_content(BytesIO(data), depth + 1)


def _cut_short(size: int) -> str:
    return f"is cut short at {size:,} bytes: download or copy it again"


def _read_pickle(file: IO[bytes], size: int) -> Any:
    """Read a plain pickle, or the format of torch before 1.6, which begins with a pickled magic number."""
    file.seek(0)
    try:
        content = Unpickler(file, encoding="latin1").load()
        if content != torch.serialization.MAGIC_NUMBER:
            return content
        file.seek(0)
        return _load_torch(file)
    except EOFError as error:
        raise UnreadableWeightsError(_cut_short(size)) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        if any(words in str(error) for words in ("truncated", "unexpected EOF", "corrupted", "exhausted")):
            raise UnreadableWeightsError(_cut_short(size)) from error
        raise
    except (KeyError, IndexError, ValueError) as error:  # the bytes are not pickle instructions
        raise UnreadableWeightsError("is damaged, or has a format that is not supported") from error


def _load_torch(file: IO[bytes]) -> Any:
    """Read a file of torch.save. If torch refuses it because of other objects, read those as placeholders."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE_MODULE)


def _read_zip(file: IO[bytes], depth: int) -> Any:
    """Read a zip archive: a file of torch.save, an `.npz`, or an archive with one weights file in it."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
        inside = {name.partition("/")[2] or name for name in names}
        if "constants.pkl" in inside:
            raise UnreadableWeightsError(
                "is a TorchScript program: if you trust it, convert it with "
                "python -c \"import torch; torch.save(torch.jit.load('FILE').state_dict(), 'weights.pth')\""
            )
        if "data.pkl" in inside:
            return _read_torch_zip(file, archive)
        if any(name in inside for name in ("archive_format", "serialized_exported_program.json")):
            raise UnreadableWeightsError(
                "is a program of torch.export: convert it with "
                "python -c \"import torch; torch.save(torch.export.load('FILE').state_dict, 'weights.pth')\""
            )
        if names and all(name.endswith(".npy") for name in names):
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        member = _find_weights_member(names, "zip")
        with archive.open(member) as inner:
            return _read_unpacked(inner, depth)


def _read_torch_zip(file: IO[bytes], archive: zipfile.ZipFile) -> Any:
    """Check the checksums of a file of torch.save and read it."""
    has_checksums = any(member.CRC for member in archive.infolist())  # torch does not compare them
    if has_checksums and archive.testzip() is not None:
        raise UnreadableWeightsError("is damaged: its content does not match its checksums: download or copy it again")
    file.seek(0)
    try:
        return _load_torch(file)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise UnreadableWeightsError("is damaged: download or copy it again") from error


def _is_tar(file: IO[bytes]) -> bool:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return bool(archive.getnames())
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)


def _read_tar(file: IO[bytes], depth: int) -> Any:
    """Read the only weights file in an uncompressed tar archive."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = [member.name for member in archive if member.isfile()]
        if {"storages", "tensors", "pickle"} <= set(names):
            raise UnreadableWeightsError(
                "was saved by torch before 0.2: load it and save it again with an older torch first"
            )
        inner = archive.extractfile(_find_weights_member(names, "tar"))
        assert inner is not None
        return _read_unpacked(inner, depth)


def _find_weights_member(names: list[str], kind: str) -> str:
    """Return the name of the only weights file in an archive."""
    candidates = [name for name in names if name.lower().endswith(SUFFIXES)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UnreadableWeightsError(f"is a {kind} archive without weights: it contains {_list_names(names)}")
    raise UnreadableWeightsError(
        f"is a {kind} archive with several weights files: unpack it and give one of {_list_names(candidates)}"
    )


def _list_names(names: list[str]) -> str:
    return shorten(names, MAX_LISTED_NAMES) if names else "nothing"


def _read_safetensors(file: IO[bytes], size: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    file.seek(0)
    try:
        tensors = safetensors.torch.load(file.read())
    except KeyError as error:  # a dtype of the format that torch lacks
        raise UnreadableWeightsError(f"contains tensors of dtype {error.args[0]}: convert them to float32") from error
    except SafetensorError as error:
        if any(text in str(error) for text in INCOMPLETE_SAFETENSORS):  # or longer than its header says, which is rare
            raise UnreadableWeightsError(_cut_short(size)) from error
        raise
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # the scale of a float8 tensor lies elsewhere
            raise UnreadableWeightsError(f"contains {name} as {tensor.dtype}: convert it to float32")
    return tensors


def _raise_if_text(start: bytes) -> None:
    """Raise `UnreadableWeightsError` if the file is text: a web page, a git-LFS pointer or any other text."""
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    lower = text.lower()
    if lower.startswith("version https://git-lfs"):
        raise UnreadableWeightsError(
            "is a git-LFS pointer and not the file itself: run git lfs pull in the repository it comes from"
        )
    if lower.startswith(("<!doctype", "<html", "<?xml", "<head", "<!--")) or "<html" in lower:
        title = re.search(r"<(?:title|message)>\s*([^<]*)", text, re.IGNORECASE)
        title_note = f" ({title[1].strip()[:60]})" if title else ""
        raise UnreadableWeightsError(
            f"is a web page{title_note} and not the file itself: download it from the link to the file"
        )
    readable = sum(char.isprintable() or char in "\r\n\t" for char in text)
    if readable == len(text) and "\ufffd" not in text[:-4] and not re.match(r"\(?[dl]p\d|\([a-z]|c[\w.]+\n", text):
        raise UnreadableWeightsError(f"is text that begins with {text.splitlines()[0][:40]!r}, not a weights file")


def _describe_folder(folder: Path) -> str:
    """Say what to do with a folder: convert it, or give one of its files."""
    if any(folder.glob("*.distcp")):
        return (
            "is a folder of torch.distributed.checkpoint: convert it with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        )
    files = sorted(str(file.relative_to(folder)) for place in ("*", "*/*") for file in folder.glob(place))
    candidates = [file for file in files if file.lower().endswith(SUFFIXES)]
    if not candidates:
        return "is a folder without weights files: give a file"
    return f"is a folder: give one of its files, {_list_names(candidates)}"
